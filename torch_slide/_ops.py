"""The only file that touches torch.ops: loads the C++ library and registers fake kernels and autograd."""

import os
from pathlib import Path

import torch


def _load() -> None:
    folder = Path(__file__).parent
    libraries = sorted(folder.glob("_C*.so"))
    if not libraries:
        raise ImportError(
            f"torch_slide: the C++ library is not built in {folder}; run "
            "`pip install --no-build-isolation .` or `python setup.py build_ext --inplace`"
        )
    torch.ops.load_library(os.fspath(libraries[0]))


_load()
ops = torch.ops.torch_slide
ops.isa()  # An impossible TORCH_SLIDE_ISA is an error at import, not at the first step.


@torch.library.register_fake("torch_slide::project")
def _(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], columns.shape[1]))


def _codes(x: torch.Tensor, num_tables: int, probes: int = 1) -> torch.Tensor:
    return x.new_empty((x.shape[0], num_tables, probes), dtype=torch.int32)


@torch.library.register_fake("torch_slide::simhash")
def _(x: torch.Tensor, projections: torch.Tensor, num_tables: int, probes: int) -> torch.Tensor:
    return _codes(x, num_tables, probes)


@torch.library.register_fake("torch_slide::winner_take_all")
def _(x: torch.Tensor, bins: torch.Tensor, detours: torch.Tensor | None, num_tables: int) -> torch.Tensor:
    return _codes(x, num_tables)


@torch.library.register_fake("torch_slide::minhash")
def _(
    x: torch.Tensor, bins: torch.Tensor, detours: torch.Tensor, labels: torch.Tensor, num_tables: int, top: int
) -> torch.Tensor:
    return _codes(x, num_tables)


@torch.library.register_fake("torch_slide::nearest_centroids")
def _(
    x: torch.Tensor, centroids: torch.Tensor, num_tables: int, probes: int, guides: torch.Tensor | None = None
) -> torch.Tensor:
    return _codes(x, num_tables, probes)


@torch.library.register_fake("torch_slide::cluster_sums")
def _(x: torch.Tensor, codes: torch.Tensor, num_clusters: int) -> torch.Tensor:
    return x.new_empty((num_clusters, x.shape[1]))


@torch.library.register_fake("torch_slide::row_norms")
def _(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return weight.new_empty(weight.shape[0])


@torch.library.register_fake("torch_slide::augment_rows")
def _(weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor | None, max_norm: float) -> torch.Tensor:
    return weight.new_empty((weight.shape[0] if rows is None else rows.shape[0], weight.shape[1] + 2))


@torch.library.register_fake("torch_slide::update_tables_")
def _(*args: object) -> None: ...


@torch.library.register_fake("torch_slide::fill_tables_")
def _(*args: object) -> None: ...


@torch.library.register_fake("torch_slide::select")
def _(labels: torch.Tensor, label_offsets: torch.Tensor, *args: object) -> tuple[torch.Tensor, ...]:
    total = torch.library.get_ctx().new_dynamic_size()
    return (
        labels.new_empty(total),
        torch.empty_like(label_offsets),
        labels.new_empty(total, dtype=torch.uint8),
        labels.new_empty(total, dtype=torch.float32),
        torch.empty_like(labels),
    )


@torch.library.register_fake("torch_slide::softmax_cross_entropy_")
def _(logits: torch.Tensor, row_offsets: torch.Tensor, *args: object) -> torch.Tensor:
    return logits.new_empty(row_offsets.shape[0] - 1)


@torch.library.register_fake("torch_slide::bce_with_logits_")
def _(logits: torch.Tensor, row_offsets: torch.Tensor, *args: object) -> torch.Tensor:
    return logits.new_empty(row_offsets.shape[0] - 1)


@torch.library.register_fake("torch_slide::uses_by_row")
def _(row_offsets: torch.Tensor, ids: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, ...]:
    used = torch.library.get_ctx().new_dynamic_size()
    numbers = ids.new_empty(ids.shape, dtype=torch.int32)
    return ids.new_empty(used), ids.new_empty(used + 1), numbers, torch.empty_like(numbers)


@torch.library.register_fake("torch_slide::sampled_linear")
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor,
    starts: torch.Tensor,
    entries: torch.Tensor,
    samples: torch.Tensor,
) -> torch.Tensor:
    return hidden.new_empty(entries.shape)


@torch.library.register_fake("torch_slide::sampled_linear_backward")
def _(
    grad_values: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    *uses: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    num_rows = rows.shape[0]
    return torch.empty_like(hidden), hidden.new_empty((num_rows, hidden.shape[1])), hidden.new_empty(num_rows)


@torch.library.register_fake("torch_slide::rows_to_dense")
def _(rows: torch.Tensor, values: torch.Tensor, num_rows: int) -> torch.Tensor:
    return values.new_empty((num_rows, *values.shape[1:]))


@torch.library.register_fake("torch_slide::lazy_adam_")
def _(*args: object) -> None: ...


@torch.library.register_fake("torch_slide::rowwise_adam_")
def _(*args: object) -> None: ...


@torch.library.register_fake("torch_slide::rowwise_adagrad_")
def _(*args: object) -> None: ...


@torch.library.register_fake("torch_slide::row_sgd_")
def _(*args: object) -> None: ...


@torch.library.register_fake("torch_slide::sum_by_row")
def _(
    ids: torch.Tensor, values: torch.Tensor, source: torch.Tensor | None = None, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(rows), values.new_empty((rows, values.shape[1]))


@torch.library.register_fake("torch_slide::sum_bags")
def _(
    weight: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    return weight.new_empty((offsets.shape[0] - 1, weight.shape[1]))
