"""Run by test_isa.py in a process of its own for each instruction set: prints a digest of every result that selects
neurons, for several numbers of threads and chunkings of the rows."""

import hashlib
import json

import torch

from torch_slide._ops import ops
from torch_slide.config import LSHConfig
from torch_slide.hashing import FAMILIES, augment_rows, hash_family, row_norms


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def results(chunk: int) -> dict[str, str]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(157, 37, generator=generator) * 10 ** torch.randn(157, 1, generator=generator)
    bias = torch.randn(157, generator=generator)
    weight[3] = weight[4] = 0
    norms = row_norms(weight, bias)
    rows = augment_rows(weight, bias, float(norms.max()))
    found = {"row_norms": digest(norms), "augment_rows": digest(rows)}
    columns = torch.randn(39, 50, generator=generator)
    found["project"] = digest(torch.cat([ops.project(part, columns) for part in rows.split(chunk)]))
    for name, cls in FAMILIES.items():
        config = LSHConfig(family=name, num_tables=5, hashes_per_table=4)
        family = hash_family(39, config)
        params = family.fit(rows, 1)
        probes = 7 if cls.multi_probe else 1
        for kind, x in (("", rows), ("_of_integers", (weight.sign() * 2).round().repeat(1, 2)[:, :39])):
            codes = torch.cat([family.codes(params, part, probes) for part in x.split(chunk)])
            found[name + kind] = digest(codes)
        found[f"{name}_params"] = digest(*params.values())
    return found | row_updates(generator)


def row_updates(generator: torch.Generator) -> dict[str, str]:
    found = {}
    for d in (1, 37, 100):
        weight, m, grad = (torch.randn(2000, d, generator=generator) for _ in range(3))
        v, total, rows = m.abs(), torch.ones(2000), torch.arange(0, 2000, 2)
        grad = grad[: len(rows)].contiguous()
        ops.lazy_adam_(weight, m, v, rows, grad, 0.1, 0.9, 0.99, 1e-8, 0.1, False, False, 7)
        found[f"lazy_adam_{d}"] = digest(weight, m, v)
        ops.rowwise_adagrad_(weight, total, rows, grad, 0.1, 1e-8, 0.1, False, 1.0)
        found[f"rowwise_adagrad_{d}"] = digest(weight, total)
        ops.row_sgd_(weight, m, rows, grad, 0.1, 0.9, 0.3, False, 0.1, False, 1.0)
        found[f"row_sgd_{d}"] = digest(weight, m)
        ops.rowwise_adam_(weight, m, total, rows, grad, 0.1, 0.9, 0.99, 1e-8, 0.1, True, False, 7)
        found[f"rowwise_adam_{d}"] = digest(weight, m, total)
        low, low_grad = [t.bfloat16() for t in (weight, m, v)], grad.bfloat16()
        ops.lazy_adam_(*low, rows, low_grad, 0.1, 0.9, 0.99, 1e-8, 0.1, False, False, 7)
        ops.rowwise_adam_(*low[:2], total, rows, low_grad, 0.1, 0.9, 0.99, 1e-8, 0.1, False, False, 8)
        found[f"bfloat16_{d}"] = digest(*(t.view(torch.int16) for t in low), total)
        ids = torch.randint(0, 700, (2000,), generator=generator)
        found[f"sum_by_row_{d}"] = digest(*ops.sum_by_row(ids, weight, None, m[:, 0].contiguous()))
    return found


if __name__ == "__main__":
    runs = []
    for threads, chunk in ((1, 157), (2, 157), (4, 157), (2, 1), (1, 50)):
        torch.set_num_threads(threads)
        runs.append(results(chunk))
    print(json.dumps({"isa": ops.isa(), "runs": runs}))
