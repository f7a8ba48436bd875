"""HashFamily, what every family answers, and the registry that knows them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol, TypeVar

from torch import Tensor

from torch_slide.config import BITS_PER_HASH, MULTI_PROBE_FAMILIES, LSHConfig


class RowSource(Protocol):
    """The rows to hash, read a few at a time; a tensor [n, in_features] is one."""

    def __len__(self) -> int:
        """Number of rows, n."""

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """The rows of an int64 index [m], as float32 [m, in_features]."""


class HashFamily(ABC):
    """Turns vectors into bucket numbers, one for each table. Stateless: its parameters come and go as tensors.

    Codes are computed in float32 and are bit-equal for every instruction set, number of threads and chunking of the
    rows.

    Args:
        in_features: width of the vectors that are hashed (after :func:`augment_rows`, if that is used).
        config: ``num_tables``, ``hashes_per_table`` and the like; its ``family`` and ``seed`` are not read.

    Attributes:
        name: how ``LSHConfig(family=...)`` calls it.
        bits_per_hash: bits that one hash contributes to a code.
        multi_probe: whether it knows a second-best bucket.
        data_dependent: whether :meth:`fit` looks at the rows.
    """

    name: ClassVar[str]
    bits_per_hash: ClassVar[int]
    multi_probe: ClassVar[bool] = False
    data_dependent: ClassVar[bool] = False

    def __init__(self, in_features: int, config: LSHConfig) -> None:
        if in_features < 1:
            raise ValueError(f"{type(self).__name__}: expected in_features to be at least 1, got {in_features}")
        self.in_features = in_features
        self.num_tables = config.num_tables
        self.hashes_per_table = config.hashes_per_table

    @abstractmethod
    def draw(self, seed: int) -> dict[str, Tensor]:
        """Parameters that depend on nothing but the seed; always of the same names, shapes and dtypes."""

    def fit(self, rows: RowSource, seed: int) -> dict[str, Tensor]:
        """Parameters for these rows, shaped as those of :meth:`draw`, which is what families that need no data give."""
        return self.draw(seed)

    def row_codes(self, params: dict[str, Tensor], rows: Tensor) -> Tensor:
        """Where rows are inserted, int32 [n, num_tables]: their own buckets, or nearly so where that is quicker."""
        return self.codes(params, rows)[:, :, 0]

    @abstractmethod
    def _codes(self, params: dict[str, Tensor], x: Tensor, probes: int) -> Tensor:
        """``codes`` for a checked, contiguous float32 ``x``."""

    def codes(self, params: dict[str, Tensor], x: Tensor, probes: int = 1) -> Tensor:
        """Bucket numbers of each vector.

        Args:
            params: from :meth:`draw` or :meth:`fit`.
            x: [n, in_features], floating, on the CPU; converted to float32.
            probes: buckets for each vector and table, the likeliest first; the first is the vector's own.

        Returns:
            int32 [n, num_tables, probes], in [0, 2 ** (hashes_per_table * bits_per_hash)), distinct within a table.

        Raises:
            ValueError: if ``x`` has another shape or device, or the family has not so many probes.
            TypeError: if ``x`` is not floating.
        """
        name = type(self).__name__
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"{name}: expected x to be [n, {self.in_features}], got {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected x to be floating, got {x.dtype}")
        if x.device.type != "cpu":
            raise ValueError(f"{name}: expected x to be on the CPU, got {x.device}")
        most = 2 ** (self.hashes_per_table * self.bits_per_hash) if self.multi_probe else 1
        if not 1 <= probes <= most:
            raise ValueError(f"{name}: expected probes to be between 1 and {most}, got {probes}")
        return self._codes(params, x.detach().float().contiguous(), probes)


FAMILIES: dict[str, type[HashFamily]] = {}

_Family = TypeVar("_Family", bound=type[HashFamily])


def register(family: _Family) -> _Family:
    """Class decorator that makes a family known as ``LSHConfig(family=family.name)``."""
    FAMILIES[family.name] = family
    BITS_PER_HASH[family.name] = family.bits_per_hash
    if family.multi_probe:
        MULTI_PROBE_FAMILIES.add(family.name)
    return family


def hash_family(in_features: int, config: LSHConfig) -> HashFamily:
    """The family that the configuration names, for vectors of this width.

    Raises:
        ValueError: if no such family is registered.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"hash_family: expected family to be one of {tuple(FAMILIES)}, got {config.family!r}")
    return FAMILIES[config.family](in_features, config)
