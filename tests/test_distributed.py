"""Data-parallel training in two processes over gloo."""

import datetime
import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import torch_slide as ts

RANKS, D, N = 2, 8, 200
PASSED = "passed"
ALMOST_ALL = ts.LSHConfig(selector="uniform", num_active=N - 1)
FEW = ts.LSHConfig(family="simhash", num_tables=4, hashes_per_table=4, bucket_size=16, num_active=40, num_hubs=8,
                   rehash=ts.RehashSchedule(every=3))  # fmt: skip

pytestmark = pytest.mark.slow


def model_of(lsh):
    torch.manual_seed(7)
    # A layer that takes no part: what find_unused_parameters is for.
    return nn.ModuleDict(
        {"body": nn.Linear(D, D), "unused": nn.Linear(D, D), "head": ts.SparseLSHLinear(D, N, lsh=lsh)}
    )


class Model(nn.Module):
    def __init__(self, lsh):
        super().__init__()
        self.parts = model_of(lsh)

    def forward(self, x):
        return self.parts["head"](torch.tanh(self.parts["body"](x)))


def batch(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(12, D, generator=generator), torch.randint(0, N, (12,), generator=generator)


def gradients_are_those_of_the_union(rank):
    model = nn.parallel.DistributedDataParallel(Model(ALMOST_ALL), find_unused_parameters=True)
    x, y = batch(0, rank)
    F.cross_entropy(model(x), y).backward()
    single = Model(ALMOST_ALL)
    parts = [batch(0, r) for r in range(RANKS)]
    hidden = torch.tanh(single.parts["body"](torch.cat([x for x, _ in parts])))
    head = single.parts["head"]
    F.cross_entropy(F.linear(hidden, head.weight, head.bias), torch.cat([y for _, y in parts])).backward()
    for (name, mine), theirs in zip(model.module.named_parameters(), single.parameters(), strict=True):
        if "unused" not in name:
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def ranks_stay_alike_without_sending_tables(rank):
    model = nn.parallel.DistributedDataParallel(Model(FEW), find_unused_parameters=True)
    assert not model.modules_buffers, "DDP would broadcast them at every forward"
    assert not list(model.buffers())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for step in range(8):
        x, y = batch(step, rank)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    head = model.module.parts["head"]
    assert int(head.selector.state["clock"][2]) >= 3, "tables were rehashed on the way"
    # What a process has seen of the softmax is its own, and so are its hubs.
    about_this_process = ("counters", "timers", "shares", "hubs")
    for name, tensor in [*head.selector.state.items(), *model.named_parameters()]:
        if name in about_this_process:
            continue
        others = [torch.empty_like(tensor) for _ in range(RANKS)]
        dist.all_gather(others, tensor.detach().contiguous())
        assert all(torch.equal(others[0], other) for other in others), name


class ModelWithLoss(Model):
    def forward(self, x, y):
        return F.cross_entropy(super().forward(x), y)


def fsdp_shards_a_module_that_computes_its_loss(rank):
    from torch.distributed.fsdp import fully_shard

    x, y = batch(0, rank)
    single = Model(ALMOST_ALL)
    parts = [batch(0, r) for r in range(RANKS)]
    hidden = torch.tanh(single.parts["body"](torch.cat([x for x, _ in parts])))
    head = single.parts["head"]
    F.cross_entropy(F.linear(hidden, head.weight, head.bias), torch.cat([y for _, y in parts])).backward()
    for reshard in (True, False):
        model = ModelWithLoss(ALMOST_ALL)
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (RANKS,)), reshard_after_forward=reshard)
        model(x, y).backward()
        for name in ("weight", "bias"):
            grad = getattr(model.parts["head"], name).grad.full_tensor()
            torch.testing.assert_close(grad, getattr(head, name).grad)


def fsdp_around_the_head_is_a_clear_error(rank):
    from torch.distributed.fsdp import fully_shard

    x, _ = batch(0, rank)
    for reshard in (True, False):
        model = Model(FEW)
        mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
        fully_shard(model.parts["head"], mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh)
        with pytest.raises(RuntimeError, match=r"SparseLogits: .*FSDP2.*compute the loss inside the wrapped module"):
            model(x)


def _run(rank, name, store, reports):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
        )
        globals()[name](rank)
        report = PASSED
    except BaseException:
        report = f"rank {rank}:\n{traceback.format_exc()}"
    reports.put(report)
    # DTensor's caches keep the process group of FSDP2 beyond destroy_process_group(), and with it gloo's threads, which
    # now and then abort a process whose interpreter is shutting down: it has no shutdown.
    os._exit(0)


@pytest.mark.parametrize(
    "task",
    [
        gradients_are_those_of_the_union,
        ranks_stay_alike_without_sending_tables,
        fsdp_around_the_head_is_a_clear_error,
        fsdp_shards_a_module_that_computes_its_loss,
    ],
    ids=lambda task: task.__name__,
)
def test_two_processes(task, tmp_path):
    context = mp.get_context("spawn")
    reports = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(rank, task.__name__, tmp_path / "store", reports)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
    for process in processes:
        if process.is_alive():
            process.kill()
            pytest.fail("a process did not come to an end")
    received = []
    while not reports.empty():
        received.append(reports.get())
    assert received == [PASSED] * RANKS, f"{len(received)} of {RANKS} processes reported:\n" + "\n".join(received)
    assert all(process.exitcode == 0 for process in processes)
