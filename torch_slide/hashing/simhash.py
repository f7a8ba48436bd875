"""SimHash: signs of sparse random projections."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torch_slide._ops import ops
from torch_slide.hashing import draws
from torch_slide.hashing.family import HashFamily, register


@register
class SimHash(HashFamily):
    """Signs of K random projections make a code (Charikar, STOC 2002): close angles, equal codes.

    As in SLIDE (MLSys 2020, section 2.1 and appendix) each projection adds and subtracts a random third of the
    coordinates (all of them below three). Two vectors at the angle theta agree in one bit with a probability of about
    1 - theta / pi; exactly so for Gaussian projections, to which dense ones come close.

    Bit k of a code is set where the k-th projection is positive. Further probes flip the bits whose projections lie
    nearest to zero (Lv et al., VLDB 2007): first one of them, nearest first, then pairs, triples and so on; sets of
    one size in ascending order of the sum of 2**rank, where rank 0 is the nearest bit.

    Parameters: ``projections`` int8 [in_features, L * K], so that a cast of the layer leaves them as they are.
    """

    name = "simhash"
    bits_per_hash = 1
    multi_probe = True

    def draw(self, seed: int) -> dict[str, Tensor]:
        """Projections of +1, -1 and 0."""
        shape = (self.num_tables * self.hashes_per_table, self.in_features)
        members = self.in_features // 3 if self.in_features >= 3 else self.in_features
        chosen = draws.permutations(seed, 0, shape=shape) < members
        signs = np.where(draws.words(seed, 1, shape=shape) >> np.uint64(63), 1, -1).astype(np.int8)
        return {"projections": torch.from_numpy(np.ascontiguousarray((signs * chosen).T))}

    def _codes(self, params: dict[str, Tensor], x: Tensor, probes: int) -> Tensor:
        return ops.simhash(x, params["projections"], self.num_tables, probes)
