"""HashTables: the L tables over the rows of one layer. They know nothing of who owns the rows."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from torch_slide import functional
from torch_slide.config import POLICIES, LSHConfig
from torch_slide.hashing import augment_queries, augment_rows, hash_family, row_norms

# Rows that are hashed at a time: their projections stay in the cache, and a rehash needs no memory to speak of.
_CHUNK = 4096
# The MIPS transform scales by a norm that all rows but this share stay below. With the largest norm itself, which a few
# rows raise far above the others, all others would crowd at the pole of the sphere and share their buckets. Rows beyond
# it are hashed by their direction alone; few as they are, most are hubs, which are candidates anyway.
_BEYOND_NORM = 0.01
# Weights grow: the norm is pinned until it is off by this factor, since a new one means new codes for every row. So
# do new centroids, which are due when there are twice as many rows as they were found for.
_NORM_DRIFT = 1.4
_MORE_ROWS = 2
# Every rehash asks for that quantile: a sample serves.
_NORM_SAMPLE = 1 << 16


class HashTables:
    """Buckets of row numbers, kept as plain int32 tensors in ``state``.

    The buckets are a function of the codes (see csrc/core/tables.h), so a partial re-insert of changed rows leaves
    bit for bit what a full rebuild leaves, and a checkpoint needs the codes alone.

    After :meth:`begin` no row is in a table until it is admitted. Of a layer that begins at random only rows that have
    been a label can have learned to score high; the others, most of millions, would crowd the buckets. Their norms have
    a negative sign.

    Args:
        in_features: width of a row.
        out_features: number of rows, N.
        config: family, L, K, bucket size and policy, norm_aware, seed.

    Raises:
        ValueError: if the tables would not fit into the machine's memory.
    """

    def __init__(self, in_features: int, out_features: int, config: LSHConfig) -> None:
        self.out_features = out_features
        self.config = config
        self.family = hash_family(in_features + 2 if config.norm_aware else in_features, config)
        self.state = self._empty_state()

    def _empty_state(self) -> dict[str, Tensor]:
        config, rows = self.config, self.out_features
        wanted, present = config.table_bytes(rows), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if wanted > present:
            raise ValueError(
                f"LSHConfig: expected tables for {rows} neurons to fit into this machine's {present / 2**30:.1f} GiB, "
                f"got {wanted / 2**30:.1f} GiB; lower num_tables, hashes_per_table or bucket_size"
            )
        buckets = (config.num_tables, config.num_buckets)
        return {
            "codes": torch.full((config.num_tables, rows), -1, dtype=torch.int32),
            "buckets": torch.zeros((*buckets, config.bucket_size), dtype=torch.int32),
            "counts": torch.zeros(buckets, dtype=torch.int32),
            "norms": torch.zeros(rows, dtype=torch.float32),
            # The norm that vectors are scaled by, and the number of rows, at a redraw.
            "drawn_for": torch.zeros(2, dtype=torch.float32),
            **{f"hash.{name}": value for name, value in self.family.draw(config.seed).items()},
        }

    @property
    def _hash_params(self) -> dict[str, Tensor]:
        return {key.removeprefix("hash."): value for key, value in self.state.items() if key.startswith("hash.")}

    @property
    def overflow(self) -> float:
        """Share of the (row, table) pairs that found no room in their bucket."""
        counts = self.state["counts"]
        return (counts - self.config.bucket_size).clamp_(min=0).sum().item() / max(1, counts.sum().item())

    @torch.no_grad()
    def begin(self, weight: Tensor, bias: Tensor | None) -> None:
        """The rows were just made at random: empty tables, and no members."""
        self.state["codes"].fill_(-1)
        self.state["drawn_for"].zero_()
        self.refill()
        self.state["norms"].copy_(row_norms(weight, bias).neg_())

    @torch.no_grad()
    def as_begun(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether nothing was admitted or written since :meth:`begin`; every row is known by its norm."""
        return torch.equal(self.state["norms"], row_norms(weight, bias).neg_())

    def are_members(self, rows: Tensor) -> Tensor:
        """Which of the rows (int64 [n]) are members, bool [n]."""
        return ~self.state["norms"][rows].signbit()

    @property
    def members(self) -> Tensor:
        """All members: int64, ascending."""
        return (~self.state["norms"].signbit()).nonzero().squeeze(1)

    @torch.no_grad()
    def measure(self, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> None:
        """Takes the norms of the given rows, or of all; the first step of following the weights.

        Args:
            weight: [N, in_features].
            bias: [N] or None.
            rows: int64, unique.

        Raises:
            ValueError: if a row is not finite; nothing is changed then.
        """
        measure_(self.state["norms"], weight, bias, rows)

    @torch.no_grad()
    def redraw(self, weight: Tensor, bias: Tensor | None, seed: int) -> None:
        """New hash functions, for the measured norms; every row has to be inserted again afterwards."""
        members = self.members
        norms = self.state["norms"][members]
        self.state["drawn_for"].copy_(torch.tensor([_typical_norm(norms), len(members)], dtype=torch.float32))
        for name, value in self.family.fit(_Vectors(self, weight, bias, members), seed).items():
            self.state[f"hash.{name}"].copy_(value)

    @torch.no_grad()
    def insert(self, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> None:
        """Hashes the given rows (int64, unique), or all, with those just admitted; moves those whose codes changed.

        Only members are looked at. If no other row has changed since, a partial insert leaves what inserting all would
        leave.
        """
        state = self.state
        if rows is None:
            state["codes"].fill_(-1)
            if len(members := self.members) > 0:
                state["codes"][:, members] = self._hash(weight, bias, members).T
            self.refill()
            return
        admitted = ~state["norms"].signbit() & (state["codes"][0] < 0)
        rows = torch.cat([rows[self.are_members(rows)], admitted.nonzero().squeeze(1)]).unique()
        if len(rows) > 0:
            codes = self._hash(weight, bias, rows)
            functional.update_tables_(
                state["codes"], state["buckets"], state["counts"], rows, codes, self._policy, self.config.seed
            )

    @torch.no_grad()
    def codes(self, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        """The bucket numbers that :meth:`insert` would give to the rows (int64 [n]), -1 if no members: int32 [n, L]."""
        codes = torch.full((len(rows), self.config.num_tables), -1, dtype=torch.int32)
        members = self.are_members(rows)
        if float(self.state["drawn_for"][1]) > 0 and bool(members.any()):
            codes[members] = self._hash(weight, bias, rows[members])
        return codes

    def drift(self, weight: Tensor, bias: Tensor | None, rows: Tensor) -> float:
        """Share of the entries of these members (int64 [n]) that are out of date, all if outgrown; 0 of none."""
        if self.outgrown():
            return 1.0
        moved = self.state["codes"][:, rows] != self.codes(weight, bias, rows).T
        return float(moved.double().mean()) if moved.numel() else 0.0

    def outgrown(self) -> bool:
        """Whether the rows are not those any more that the hash functions were drawn for."""
        norm, drawn_for = self.state["drawn_for"].tolist()
        norms = self.state["norms"][self.members]
        if len(norms) == 0 or drawn_for == 0:
            return len(norms) > 0
        if self.family.data_dependent and len(norms) >= _MORE_ROWS * drawn_for:
            return True
        return self.config.norm_aware and not 1 / _NORM_DRIFT < _typical_norm(norms) / norm < _NORM_DRIFT

    def refill(self) -> None:
        """Fills the buckets from the codes alone, as after loading a checkpoint."""
        state = self.state
        functional.fill_tables_(state["codes"], state["buckets"], state["counts"], self._policy, self.config.seed)

    @torch.no_grad()
    def query(self, hidden: Tensor) -> Tensor:
        """Bucket numbers of each hidden vector: [B, in_features] -> int32 [B, L, probes]."""
        hidden = hidden.detach().float().contiguous()
        x = augment_queries(hidden) if self.config.norm_aware else hidden
        return self.family.codes(self._hash_params, x, self.config.probes)

    @property
    def _policy(self) -> int:
        return POLICIES.index(self.config.bucket_policy)

    def vectors(self, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        """What is hashed of the given rows, float32 [n, in_features or in_features + 2]."""
        if self.config.norm_aware:
            return augment_rows(weight, bias, float(self.state["drawn_for"][0]), rows)
        return weight[rows].float()

    def _hash(self, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        params = self._hash_params
        chunks = (self.vectors(weight, bias, some) for some in rows.split(_CHUNK))
        return torch.cat([self.family.row_codes(params, x) for x in chunks])


def admit_(norms: Tensor, rows: Tensor | None = None) -> None:
    """Makes these rows (int64 [n]), or all, members of the tables with these norms: the next insert takes them in."""
    if rows is None:
        norms.abs_()
    else:
        norms[rows] = norms[rows].abs()


@torch.no_grad()
def measure_(norms: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> None:
    """Brings the norms of the given rows, or of all, up to date.

    Args:
        norms: float32 [N], overwritten but for the signs, which are the tables' own.
        weight: [N, in_features].
        bias: [N] or None.
        rows: int64, unique.

    Raises:
        ValueError: if a row is not finite; nothing is changed then.
    """
    measured = checked_norms(weight, bias, rows)
    if rows is None:
        norms.copy_(measured.copysign_(norms))
    else:
        norms[rows] = measured.copysign_(norms[rows])


class _Vectors:
    """The vectors that are hashed, by their number among the members: a family that is trained wants some of them."""

    def __init__(self, tables: HashTables, weight: Tensor, bias: Tensor | None, members: Tensor) -> None:
        self._tables, self._weight, self._bias, self._members = tables, weight, bias, members

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self._tables.vectors(self._weight, self._bias, self._members[index])


def _typical_norm(norms: Tensor) -> float:
    sample = norms[:: max(1, len(norms) // _NORM_SAMPLE)]
    rank = max(1, round(len(sample) * (1 - _BEYOND_NORM)))
    return max(float(sample.kthvalue(rank).values), torch.finfo(torch.float32).tiny)


def checked_norms(weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """Norms of the given rows (int64, unique) of [weight, bias], or of all: float32 [n].

    Raises:
        ValueError: if a row is not finite.
    """
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    norms = row_norms(weight, bias)
    bad = (~torch.isfinite(norms)).nonzero()
    if len(bad):
        row = int(bad[0]) if rows is None else int(rows[bad[0]])
        raise ValueError(f"rehash: expected weight and bias to be finite, got a row that is not: {row}")
    return norms
