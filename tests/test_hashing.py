import pytest
import torch
from hashing_cases import family, rows_, seeds, vectors, widths
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_slide import reference
from torch_slide._ops import ops
from torch_slide.config import BITS_PER_HASH, MULTI_PROBE_FAMILIES
from torch_slide.hashing import (
    FAMILIES,
    HashFamily,
    augment_queries,
    augment_rows,
    register,
    row_norms,
)

BUILT_IN = ("simhash", "dwta", "wta", "minhash", "kmeans")


def by_oracle(family: HashFamily, params: dict[str, Tensor], x: Tensor, probes: int) -> Tensor:
    tables = family.num_tables
    match family.name:
        case "simhash":
            return reference.simhash(x, params["projections"], tables, probes)
        case "kmeans":
            return reference.nearest_centroids(x, params["centroids"], tables, probes)
        case "minhash":
            top = max(8, x.shape[1] // 4)
            return reference.minhash(x, params["bins"], params["detours"], params["labels"], tables, top)
        case _:
            return reference.winner_take_all(x, params["bins"], params.get("detours"), tables)


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=40, deadline=None)
@given(
    n=rows_,
    d=widths,
    tables=st.integers(1, 3),
    hashes=st.integers(1, 5),
    kind=st.sampled_from(["normal", "ties", "sparse"]),
    seed=seeds,
    probes=st.integers(1, 5),
)
def test_codes_equal_the_oracle(
    name: str, n: int, d: int, tables: int, hashes: int, kind: str, seed: int, probes: int
) -> None:
    fam = family(name, d, tables, hashes)
    params = fam.fit(vectors(50, d, seed % 1000, kind), seed)
    probes = min(probes, 2**hashes) if fam.multi_probe else 1
    x = vectors(n, d, seed % 1001, kind)
    codes = fam.codes(params, x, probes)
    assert codes.dtype == torch.int32
    assert codes.shape == (n, tables, probes)
    assert torch.equal(codes, by_oracle(fam, params, x, probes))


@settings(max_examples=30, deadline=None)
@given(n=rows_, d=widths, p=st.sampled_from([1, 15, 16, 31, 32, 33, 65]), seed=st.integers(0, 1000))
def test_project_is_one_fused_chain(n: int, d: int, p: int, seed: int) -> None:
    x, columns = vectors(n, d, seed), vectors(d, p, seed + 1)
    assert torch.equal(ops.project(x, columns), reference.project(x, columns))


@pytest.mark.parametrize("hashes", [1, 5, 11, 23, 24])
def test_simhash_codes_that_straddle_words(hashes: int) -> None:
    fam = family("simhash", 9, tables=7, hashes=hashes)
    params, x = fam.draw(1), vectors(20, 9)
    assert torch.equal(fam.codes(params, x), reference.simhash(x, params["projections"], 7, 1))


def test_simhash_probes_flip_by_size_then_by_nearness() -> None:
    fam = family("simhash", 6, tables=1, hashes=3)
    projections = torch.zeros(6, 3, dtype=torch.int8)
    projections[0, 0] = projections[1, 1] = projections[2, 2] = 1
    x = torch.tensor([[3.0, -1.0, 2.0, 0.0, 0.0, 0.0]])  # code 0b101; nearest to zero: bit 1, then 2, then 0
    codes = fam.codes({"projections": projections}, x, probes=8)[0, 0].tolist()
    flips = [0, 0b010, 0b100, 0b001, 0b110, 0b011, 0b101, 0b111]
    assert codes == [0b101 ^ flip for flip in flips]


@pytest.mark.parametrize("name", sorted(MULTI_PROBE_FAMILIES & set(BUILT_IN)))
def test_probes_are_distinct_and_nested(name: str) -> None:
    fam = family(name, 20, tables=2, hashes=4)
    params = fam.fit(vectors(200, 20), 3)
    x = vectors(30, 20, 5)
    every = fam.codes(params, x, 16)
    assert torch.equal(every.sort(dim=2).values, torch.arange(16, dtype=torch.int32).expand(30, 2, 16))
    for probes in (1, 2, 6):
        assert torch.equal(fam.codes(params, x, probes), every[:, :, :probes])


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("d", [1, 3, 9, 130])
def test_parameters_follow_from_the_seed(name: str, d: int) -> None:
    fam = family(name, d)
    first, again, other = fam.draw(7), fam.draw(7), fam.draw(8)
    fitted = fam.fit(vectors(40, d), 7)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert {key: (value.shape, value.dtype) for key, value in fitted.items()} == {
        key: (value.shape, value.dtype) for key, value in first.items()
    }
    if d > 8:
        assert not any(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(("d", "members"), [(1, 1), (2, 2), (3, 1), (130, 43)])
def test_a_projection_uses_a_third_of_the_coordinates(d: int, members: int) -> None:
    projections = family("simhash", d).draw(0)["projections"]
    assert projections.dtype == torch.int8
    assert (projections.abs().sum(0) == members).all()


def test_dwta_bins_are_windows_of_whole_permutations() -> None:
    bins = family("dwta", 35, tables=4, hashes=3).draw(0)["bins"]
    assert bins.shape == (12, 8)
    for permutation in bins.split(4):  # 35 coordinates give four whole windows
        assert len(permutation.unique()) == permutation.numel()


@pytest.mark.parametrize("name", ["wta", "dwta", "minhash"])
def test_a_zero_vector_has_the_code_zero(name: str) -> None:
    fam = family(name, 20)
    assert not fam.codes(fam.draw(0), torch.zeros(3, 20)).any()


@pytest.mark.parametrize("num_detours", [0, 1])
def test_an_empty_bin_borrows_from_its_detours_then_from_the_right(num_detours: int) -> None:
    bins = torch.arange(48, dtype=torch.int32).view(6, 8)
    detours = torch.tensor([[3], [3], [1], [1], [2], [0]], dtype=torch.int32)[:, :num_detours].contiguous()
    labels = torch.arange(48, dtype=torch.uint8).expand(6, 48).contiguous() % 8
    x = torch.zeros(1, 48)
    x[0, 8 + 5] = x[0, 24 + 3] = 1.0  # bins 1 and 3 are occupied, with winners 5 and 3
    winners = [5, 5, 3, 3, 5, 5] if num_detours == 0 else [3, 5, 5, 3, 5, 5]
    assert ops.winner_take_all(x, bins, detours, 6).flatten().tolist() == winners
    assert ops.minhash(x, bins, detours, labels, 6, 9).flatten().tolist() == winners
    assert ops.winner_take_all(x, bins, None, 6).flatten().tolist() == [0, 5, 0, 3, 0, 0]


@pytest.mark.parametrize("name", BUILT_IN)
def test_codes_do_not_depend_on_the_scale_or_the_neighbours_of_a_vector(name: str) -> None:
    fam = family(name, 21)
    params = fam.fit(vectors(100, 21), 0)
    x = vectors(101, 21, 1)
    whole = fam.codes(params, x)
    assert torch.equal(whole, fam.codes(params, x * 4))
    for size in (1, 7, 16, 50):
        assert torch.equal(whole, torch.cat([fam.codes(params, part) for part in x.split(size)]))


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_hashed_in_float32(name: str, dtype: torch.dtype) -> None:
    fam = family(name, 12)
    params, x = fam.fit(vectors(60, 12), 0), vectors(30, 12, 2).to(dtype).requires_grad_()
    assert torch.equal(fam.codes(params, x), fam.codes(params, x.detach().float()))
    assert torch.equal(fam.codes(params, x.T.contiguous().T), fam.codes(params, x))


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_codes_of_non_finite_vectors_are_bucket_numbers(name: str, value: float) -> None:
    fam = family(name, 12)
    params = fam.fit(vectors(60, 12), 0)
    x = vectors(20, 12)
    x[::2, ::3] = value
    codes = fam.codes(params, x)
    assert codes.min() >= 0
    assert codes.max() < 2 ** (4 * fam.bits_per_hash)


@pytest.mark.parametrize("name", BUILT_IN)
def test_bad_vectors_are_named(name: str) -> None:
    fam = family(name, 5)
    params, label = fam.draw(0), type(fam).__name__
    with pytest.raises(ValueError, match=rf"{label}: expected x to be \[n, 5\], got \[2, 6\]"):
        fam.codes(params, torch.zeros(2, 6))
    with pytest.raises(ValueError, match=rf"{label}: expected x to be \[n, 5\], got \[5\]"):
        fam.codes(params, torch.zeros(5))
    with pytest.raises(TypeError, match=rf"{label}: expected x to be floating, got torch.int64"):
        fam.codes(params, torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"{label}: expected x to be on the CPU, got meta"):
        fam.codes(params, torch.zeros(2, 5, device="meta"))
    most = 16 if fam.multi_probe else 1
    for probes in (0, most + 1):
        with pytest.raises(ValueError, match=rf"expected probes to be between 1 and {most}, got {probes}"):
            fam.codes(params, torch.zeros(2, 5), probes)
    with pytest.raises(ValueError, match=rf"{label}: expected in_features to be at least 1, got 0"):
        family(name, 0)


def test_ops_refuse_indices_outside_of_their_tensors() -> None:
    x, bins, detours = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"winner_take_all: expected bins to be within \[0, 8\)"):
        ops.winner_take_all(x, bins + 8, detours, 1)
    with pytest.raises(ValueError, match=r"winner_take_all: expected detours to be within \[0, 2\)"):
        ops.winner_take_all(x, bins, detours - 1, 1)
    with pytest.raises(ValueError, match="minhash: expected labels to be below 8"):
        ops.minhash(x, bins, detours, torch.full((2, 8), 8, dtype=torch.uint8), 1, 4)
    with pytest.raises(ValueError, match=r"cluster_sums: expected codes to be within \[0, 3\)"):
        ops.cluster_sums(x, torch.tensor([0, 3], dtype=torch.int32), 3)


# ---- registry ----


def test_a_sixth_family_is_one_class_and_one_line() -> None:
    @register
    class Parity(HashFamily):
        name = "parity"
        bits_per_hash = 1

        def draw(self, seed: int) -> dict[str, Tensor]:
            return {}

        def _codes(self, params: dict[str, Tensor], x: Tensor, probes: int) -> Tensor:
            return (x.sum(1).round().int() % 2)[:, None, None].expand(-1, self.num_tables, 1)

    try:
        fam = family("parity", 3)
        assert isinstance(fam, Parity)
        assert fam.codes(fam.fit(torch.zeros(1, 3), 0), torch.ones(2, 3)).tolist() == [[[1]] * 3] * 2
    finally:
        del FAMILIES["parity"], BITS_PER_HASH["parity"]


def test_config_and_registry_agree() -> None:
    assert set(FAMILIES) == set(BITS_PER_HASH) == set(BUILT_IN)
    assert {name: cls.bits_per_hash for name, cls in FAMILIES.items()} == BITS_PER_HASH
    assert {name for name, cls in FAMILIES.items() if cls.multi_probe} == MULTI_PROBE_FAMILIES
    assert [name for name, cls in FAMILIES.items() if cls.data_dependent] == ["kmeans"]


# ---- the transform ----


@settings(max_examples=30, deadline=None)
@given(n=rows_, d=widths, with_bias=st.booleans(), pick=st.booleans(), seed=st.integers(0, 1000))
def test_augmented_rows_equal_the_oracle(n: int, d: int, with_bias: bool, pick: bool, seed: int) -> None:
    weight, bias = vectors(n, d, seed), vectors(n, 1, seed + 1)[:, 0] if with_bias else None
    norms = row_norms(weight, bias)
    assert torch.allclose(norms.double(), reference.row_norms(weight, bias), rtol=1e-6)
    max_norm = 1.1 * float(norms.max()) if n else 1.0
    rows = torch.randint(0, n, (13,), generator=torch.Generator().manual_seed(seed)) if pick and n else None
    augmented = augment_rows(weight, bias, max_norm, rows)
    assert augmented.dtype == torch.float32
    assert torch.allclose(augmented.double(), reference.augment_rows(weight, bias, max_norm, rows), atol=1e-6)
    assert torch.allclose(augmented.norm(dim=1), torch.ones(len(augmented)), atol=1e-5)
    if rows is not None:
        assert torch.equal(augmented, augment_rows(weight, bias, max_norm)[rows])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_transform_of_other_dtypes_and_strides(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_slide.hashing.transform._CHUNK", 7)  # several pieces
    weight, bias = vectors(20, 9).to(dtype), vectors(20, 1, 1)[:, 0].to(dtype)
    wide, wide_bias = weight.float(), bias.float()
    rows = torch.tensor([19, 0, 3, 3])
    for w, b in ((weight.requires_grad_(), bias), (wide.T.contiguous().T, wide_bias)):
        assert torch.equal(row_norms(w, b), row_norms(wide, wide_bias))
        assert torch.equal(augment_rows(w, b, 10.0), augment_rows(wide, wide_bias, 10.0))
        assert torch.equal(augment_rows(w, b, 10.0, rows), augment_rows(wide, wide_bias, 10.0, rows))
    assert not augment_rows(weight, bias, 10.0).requires_grad
    assert torch.equal(augment_queries(weight), augment_queries(wide))


def test_queries_gain_a_one_and_a_zero() -> None:
    assert augment_queries(torch.tensor([[2.0, 3.0]])).tolist() == [[2.0, 3.0, 1.0, 0.0]]
    assert augment_queries(torch.zeros(0, 4)).shape == (0, 6)


def test_norms_of_rows_that_are_not_finite_are_not() -> None:
    weight = vectors(4, 20)
    weight[1, 3], weight[2, 19] = float("nan"), -float("inf")
    bias = torch.tensor([0.0, 0.0, 0.0, float("nan")])
    assert torch.isfinite(row_norms(weight, bias)).tolist() == [True, False, False, False]


def test_a_row_beyond_the_bound_has_no_rest() -> None:
    assert augment_rows(torch.tensor([[3.0]]), None, 2.0).tolist() == [[1.5, 0.0, 0.0]]


def test_bad_arguments_of_the_transform_are_named() -> None:
    weight, bias = torch.zeros(3, 4), torch.zeros(3)
    for max_norm in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=rf"expected max_norm to be a positive, finite float32, got {max_norm}"):
            augment_rows(weight, bias, max_norm)
    for low in (weight, weight.double()):
        for row in (-1, 3):
            with pytest.raises(IndexError, match=rf"augment_rows: expected rows to be in \[0, 3\), got {row}"):
                augment_rows(low, bias, 1.0, torch.tensor([0, row]))
    with pytest.raises(TypeError, match=r"augment_rows: expected rows to be int64 \[m\], got torch.int32 \[1\]"):
        augment_rows(weight, bias, 1.0, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"row_norms: expected bias to be \[3\], got \[2\]"):
        row_norms(weight, torch.zeros(2))
    with pytest.raises(ValueError, match=r"row_norms: expected weight to be \[n, d\], got \[3\]"):
        row_norms(bias)
    with pytest.raises(TypeError, match=r"row_norms: expected weight to be floating, got torch.int64"):
        row_norms(weight.long())
    with pytest.raises(ValueError, match=r"augment_queries: expected weight to be on the CPU, got meta"):
        augment_queries(weight.to("meta"))


# ---- registration ----


def op_samples() -> list[tuple[str, tuple[object, ...]]]:
    x = vectors(5, 9)
    bins, detours = torch.zeros(4, 8, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32)
    return [
        ("project", (x, vectors(9, 3))),
        ("simhash", (x, torch.ones(9, 6, dtype=torch.int8), 2, 3)),
        ("winner_take_all", (x, bins, detours, 2)),
        ("winner_take_all", (x, bins, None, 2)),
        ("minhash", (x, bins, detours, torch.zeros(4, 9, dtype=torch.uint8), 2, 3)),
        ("nearest_centroids", (x, vectors(9, 8), 2, 3)),
        ("cluster_sums", (x, torch.zeros(5, dtype=torch.int32), 3)),
        ("row_norms", (x, x[:, 0].contiguous())),
        ("row_norms", (x, None)),
        ("augment_rows", (x, None, None, 9.0)),
        ("augment_rows", (x, x[:, 0].contiguous(), torch.tensor([1, 1, 4]), 9.0)),
    ]


@pytest.mark.parametrize(("name", "args"), op_samples())
def test_opcheck(name: str, args: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(ops, name).default, args)
