"""What does each ZeRO stage cost beside PyTorch's and DeepSpeed's own, on the same two processes?

    python benchmarks/zero_speed.py [--peers]           --peers: DeepSpeed too (pip install -e .[peers])
    python benchmarks/zero_speed.py --rows 4 --tokens 128      a step a quarter as long: what ZeRO adds weighs more

A GPT of 14M parameters, 2 gloo ranks of one thread each. All contestants start from the same weights, see the same
rows and take their steps in turn, so that whatever slows the machine slows all; their losses must agree before anything
is timed. Figures are medians over steps of the ratio to DDP in the same turn: wall-clock time and CPU time (of both
ranks), and bytes that a rank keeps per parameter.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from report import report

import minispeed
from minispeed.collective.world import World
from minispeed.engine import Engine, MicroBatch
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.precision import DTYPES, Precision
from minispeed.schedules import constant

CONFIG = preset("medium", vocab_size=1024, max_positions=256, attention="reference")
LR, BETAS = 1e-4, (0.9, 0.95)
WARM_UP, STEPS = 2, 11
Step = Callable[[MicroBatch], Tensor]  # one update; returns this rank's mean loss


class Counted(nn.Module):
    """The GPT as other engines want it: called with a batch, it returns the mean loss."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT(CONFIG)

    def forward(self, batch: MicroBatch) -> Tensor:
        return self.gpt(batch.tokens, batch.labels, positions=batch.positions, documents=batch.documents).mean()


def ours(world: World, dtype: torch.dtype, stage: int) -> tuple[Step, Callable[[], int]]:
    """This library's engine; gradients of the one micro-batch stay in the compute dtype."""
    precision = Precision(dtype, accumulate=dtype)
    engine = Engine(
        GPT(CONFIG),
        world.group,
        precision=precision,
        schedule=constant,
        lr=LR,
        betas=BETAS,
        zero=stage,
        prefetch=4 * 10**6 if stage == 3 else 0,
    )

    def kept() -> int:
        units = engine.sharded.units
        tensors = [t for unit in units for t in (unit.flat, unit.shard, unit.master)]
        return held([*tensors, *states(engine.optimizer)])

    return lambda batch: torch.tensor(engine.train_step([batch]).loss), kept


def ddp(world: World, dtype: torch.dtype, sharded: bool = False) -> tuple[Step, Callable[[], int]]:
    """DistributedDataParallel; in bf16 with fp32 masters kept by hand; perhaps with ZeroRedundancyOptimizer."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = Counted()
    masters = [p.detach().clone() for p in model.parameters()] if dtype != torch.float32 else []
    model.to(dtype)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    trained = [nn.Parameter(master) for master in masters] or list(model.parameters())
    optimizer: torch.optim.Optimizer
    if sharded:
        optimizer = ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=LR, betas=BETAS, weight_decay=0, fused=True)
    else:
        optimizer = torch.optim.AdamW(trained, lr=LR, betas=BETAS, weight_decay=0, fused=True)

    def step(batch: MicroBatch) -> Tensor:
        loss = wrapped(batch)
        loss.backward()
        if masters:
            for master, p in zip(trained, model.parameters()):
                master.grad = p.grad.to(torch.float32)
        optimizer.step()
        if masters:
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), trained)
        wrapped.zero_grad(set_to_none=False)
        return loss.detach()

    inner = getattr(optimizer, "optim", optimizer)
    return step, lambda: held([*model.parameters(), *masters, *states(inner)])


def fsdp(world: World, dtype: torch.dtype) -> tuple[Step, Callable[[], int]]:
    """FSDP2: `fully_shard` on each block and on the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = Counted()
    mesh = init_device_mesh("cpu", (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    for block in model.gpt.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0, fused=True)

    def step(batch: MicroBatch) -> Tensor:
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, lambda: held([*(p.to_local() for p in model.parameters()), *map(local, states(optimizer))])


def deepspeed(world: World, dtype: torch.dtype, stage: int, rows: int) -> tuple[Step, Callable[[], None]]:
    """DeepSpeed's engine with torch's fused AdamW."""
    os.environ |= {"RANK": str(world.rank), "LOCAL_RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
    import deepspeed as peer

    peer.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model = Counted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0, fused=True)
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = peer.initialize(model=model, optimizer=optimizer, config=config)

    def step(batch: MicroBatch) -> Tensor:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step, lambda: None  # its states are behind several wrappers: not counted


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors that an optimizer keeps."""
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def held(tensors: list[Tensor]) -> int:
    """Return the bytes of the storages under these tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def compare(world: World, dtype_name: str, peers: bool, shape: tuple[int, int]) -> list[dict[str, object]]:
    """Step all contestants in turn on this rank, each on rows of this `shape`; return a line for each."""
    dtype = DTYPES[dtype_name]
    contestants = {"DDP": ddp(world, dtype), "ZeroRedundancyOptimizer": ddp(world, dtype, sharded=True)}
    contestants["FSDP2"] = fsdp(world, dtype)
    for stage in range(4):
        contestants[f"minispeed {stage}"] = ours(world, dtype, stage)
    for stage in range(4) if peers else ():
        contestants[f"DeepSpeed {stage}"] = deepspeed(world, dtype, stage, shape[0])
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    first: dict[str, float] = {}
    for index in range(WARM_UP + STEPS):
        batch = draw(world, index, shape)
        for name, (step, _) in contestants.items():
            world.group.all_reduce(torch.zeros(1)).wait()
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step(batch)
            spent = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu], dtype=torch.float64)
            everywhere = torch.stack([loss.to(torch.float64), spent[0] / world.size, spent[1]])
            everywhere[0] /= world.size
            world.group.all_reduce(everywhere).wait()
            if index == WARM_UP - 1:  # after updates, so that these are compared too
                first[name] = everywhere[0].item()
            if index >= WARM_UP:
                seconds[name].append((everywhere[1].item(), everywhere[2].item()))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, loss in first.items():
        assert abs(loss - first["DDP"]) <= tolerance * first["DDP"], f"{name} has loss {loss}, DDP {first['DDP']}"
    P = sum(p.numel() for p in GPT(CONFIG).parameters())
    rows = []
    for name, (_, kept) in contestants.items():
        wall, cpu = ([a[i] / b[i] for a, b in zip(seconds[name], seconds["DDP"])] for i in (0, 1))
        rows.append(
            {
                "dtype": dtype_name,
                "contestant": name,
                "loss": first[name],
                "ms": statistics.median(a[0] for a in seconds[name]) * 1e3,
                "time of DDP's": statistics.median(wall),
                "CPU time of DDP's": statistics.median(cpu),
                "lowest": min(cpu),
                "highest": max(cpu),
                "bytes per parameter": None if (bytes_kept := kept()) is None else bytes_kept / P,
            }
        )
    return rows


def draw(world: World, index: int, shape: tuple[int, int]) -> MicroBatch:
    """Return this rank's rows of a step; every token is learnt, so that a mean of ranks is the mean of all."""
    generator = torch.Generator().manual_seed(1000 * index + world.rank)
    tokens = torch.randint(0, CONFIG.vocab_size, (shape[0], shape[1] + 1), generator=generator)
    zeros = torch.zeros(shape, dtype=torch.int64)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, zeros, zeros)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", action="store_true", help="DeepSpeed too")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rows", type=int, default=8, help="of a rank's step")
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    options = parser.parse_args()
    shape = options.rows, options.tokens
    for dtype in options.dtypes:
        rows = minispeed.launch(compare, dtype, options.peers, shape, ranks=2, backend="gloo")[0]
        name = f"zero_speed_{dtype}_{options.rows * options.tokens}_tokens"
        report(name, rows, peers=options.peers, batch=options.rows, tokens=options.tokens, steps=STEPS)


if __name__ == "__main__":
    main()
