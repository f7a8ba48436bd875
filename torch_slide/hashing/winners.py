"""Winner-take-all hashes, three bits each: WTA, DWTA and MinHash."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_slide._ops import ops
from torch_slide.hashing import draws
from torch_slide.hashing.family import HashFamily, register

_BIN = 8
# Random bins that an empty one asks before it takes the nearest occupied one; with a sixteenth of the bins occupied
# they fail one time in eight.
_DETOURS = 32


def _windows(order: NDArray[np.int64], num_bins: int) -> Tensor:
    """The first ``num_bins`` windows of eight coordinates, of each permutation as many as it has whole ones."""
    width = order.shape[1]
    whole = order[:, : width - width % _BIN] if width >= _BIN else order[:, np.arange(_BIN) % width]
    return torch.from_numpy(np.ascontiguousarray(whole.reshape(-1, _BIN)[:num_bins], dtype=np.int32))


class _Winners(HashFamily):
    bits_per_hash = 3

    @property
    def num_bins(self) -> int:
        return self.num_tables * self.hashes_per_table

    def _bins_of_whole_permutations(self, seed: int) -> Tensor:
        count = -(-self.num_bins // max(1, self.in_features // _BIN))
        return _windows(draws.permutations(seed, 0, shape=(count, self.in_features)), self.num_bins)

    def _detours(self, seed: int) -> Tensor:
        chosen = draws.words(seed, 1, shape=(self.num_bins, _DETOURS)) % np.uint64(self.num_bins)
        return torch.from_numpy(chosen.astype(np.int32))


@register
class WTA(_Winners):
    """Winner-take-all (Yagnik et al., ICCV 2011): which of the first eight coordinates of a permutation is largest.

    Codes depend on the order of the coordinates only, so a monotone map of them changes nothing. The winner is a
    number of three bits, the lowest on ties; the first hash lies in the lowest bits of a code. Vectors of fewer than
    eight coordinates fill the window by going round.

    Parameters: ``bins`` int32 [L * K, 8], coordinate numbers.
    """

    name = "wta"

    def draw(self, seed: int) -> dict[str, Tensor]:
        """One permutation for each hash."""
        order = draws.permutations(seed, 0, shape=(self.num_bins, self.in_features))
        return {"bins": _windows(order[:, :_BIN], self.num_bins)}

    def _codes(self, params: dict[str, Tensor], x: Tensor, probes: int) -> Tensor:
        return ops.winner_take_all(x, params["bins"], None, self.num_tables)


@register
class DWTA(_Winners):
    """Densified winner-take-all (Chen and Shrivastava, UAI 2018): WTA for sparse vectors.

    The permutations are cut into bins of eight coordinates, so that few of them serve all hashes. A bin of zeros
    alone borrows the winner of another: the first occupied one in a random order of its own (optimal densification,
    Shrivastava, ICML 2017), at last the nearest to its right. The zero vector has the code 0.

    Parameters: ``bins`` int32 [L * K, 8] and ``detours`` int32 [L * K, 32], bin numbers.
    """

    name = "dwta"

    def draw(self, seed: int) -> dict[str, Tensor]:
        """As many permutations as the bins need."""
        return {"bins": self._bins_of_whole_permutations(seed), "detours": self._detours(seed)}

    def _codes(self, params: dict[str, Tensor], x: Tensor, probes: int) -> Tensor:
        return ops.winner_take_all(x, params["bins"], params["detours"], self.num_tables)


@register
class MinHash(_Winners):
    """Densified one-permutation minwise hashing of the set of the largest coordinates (SLIDE, MLSys 2020).

    The set of a vector holds its ``max(8, in_features // 4)`` largest coordinates, positive ones only: a large
    negative one speaks against an inner product as loudly as a positive one speaks for it. A permutation of the
    coordinates is cut into bins of eight (Li, Owen and Zhang, NIPS 2012); the hash of a bin is its first member of
    the set, and an empty bin borrows as in :class:`DWTA` (Shrivastava and Li, ICML 2014). A random label of three
    bits stands for the member (b-bit minwise hashing, Li and Koenig, WWW 2010), so that sets of Jaccard similarity J
    agree in one hash with probability J + (1 - J) / 8. The empty set has the code 0.

    Parameters: ``bins`` and ``detours`` as in DWTA, ``labels`` uint8 [L * K, in_features].
    """

    name = "minhash"

    @property
    def top(self) -> int:
        """Members of a set at most."""
        return max(8, self.in_features // 4)

    def draw(self, seed: int) -> dict[str, Tensor]:
        """As many permutations as the bins need, and labels for each hash."""
        labels = draws.words(seed, 2, shape=(self.num_bins, self.in_features)) >> np.uint64(61)
        return {
            "bins": self._bins_of_whole_permutations(seed),
            "detours": self._detours(seed),
            "labels": torch.from_numpy(labels.astype(np.uint8)),
        }

    def _codes(self, params: dict[str, Tensor], x: Tensor, probes: int) -> Tensor:
        return ops.minhash(x, params["bins"], params["detours"], params["labels"], self.num_tables, self.top)
