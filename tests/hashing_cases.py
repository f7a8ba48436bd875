"""Vectors and families for the tests of hashing."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from torch_slide.config import LSHConfig
from torch_slide.hashing import HashFamily, hash_family

rows_ = st.sampled_from([0, 1, 2, 15, 16, 17, 31, 47, 48, 49])
widths = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 33])
seeds = st.integers(0, 2**63 - 1)


def family(name: str, in_features: int, tables: int = 3, hashes: int = 4) -> HashFamily:
    config = LSHConfig(family=name, num_tables=tables, hashes_per_table=hashes, threshold=1)
    return hash_family(in_features, config)


def vectors(n: int, d: int, seed: int = 0, kind: str = "normal") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.randint(-2, 3, (n, d), generator=generator).float()
    x = torch.randn(n, d, generator=generator)
    return x * (torch.rand(n, d, generator=generator) < 0.1) if kind == "sparse" else x
