"""Laws of `initialize(mpu=...)`: a model that its caller has cut by hand is the plain loop's, and one checkpoint."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from test_deepspeed_engine import CPU, Net, close, config_of, on_ranks
from torch import Tensor, nn

import minispeed
from minispeed.checkpoint import Checkpoint
from minispeed.collective.autograd import all_reduce, copy
from minispeed.collective.group import SoloGroup
from minispeed.collective.threads import run_threads
from minispeed.collective.world import World, current_world, inside
from minispeed.errors import UserError
from minispeed.mesh import Mesh
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.testing.pool import shared_pool

STEPS, MICROS, ROWS, WIDTH, FEATURES = 3, 4, 2, 3, 8


SMALL = preset("nano", vocab_size=5, num_layers=1, model_dim=4, num_heads=2, num_kv_heads=2, head_dim=2, hidden_dim=4)


class HandCut(nn.Module):
    """Two layers of an MLP as one writes them for Megatron: slices marked, copies not."""

    def __init__(self, group: Any, mark: str = "tensor_model_parallel", dims: bool = True) -> None:
        super().__init__()
        self.group = group
        wholes = {"gain": (WIDTH,), "up": (FEATURES, WIDTH), "up_bias": (FEATURES,), "down": (WIDTH, FEATURES)}
        cut = {"up": 0, "up_bias": 0, "down": 1}
        for index, (name, shape) in enumerate({**wholes, "bias": (WIDTH,)}.items()):
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            dim = cut.get(name)
            p = nn.Parameter(whole if dim is None else whole.chunk(group.size, dim)[group.rank].contiguous())
            if dim is not None:
                setattr(p, mark, True)
                if dims:
                    p.partition_dim, p.partition_stride = dim, 1
            self.register_parameter(name, p)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(copy(x * self.gain, self.group), self.up, self.up_bias))
        return ((all_reduce(F.linear(hidden, self.down), self.group) + self.bias - x) ** 2).mean()


def rows(step: int) -> Tensor:
    """Draw the micro-batches of a step, (MICROS, ROWS, WIDTH)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(MICROS, ROWS, WIDTH, generator=generator, dtype=torch.float64)


def mpu_of(data: Any, model: Any, tensor: bool = True) -> Any:
    """Return an mpu with Megatron's names, or with the older ones."""
    names = "get_tensor_model_parallel_group" if tensor else "get_model_parallel_group"
    return SimpleNamespace(get_data_parallel_group=lambda: data, **{names: lambda: model})


def cut_by_hand(world: World, width: int, tp_is_fast: bool, stage: int, folder: str, mark: str, first: int) -> Any:
    """Train as one rank of a model cut by hand, three steps, from the checkpoint of `first` steps."""
    mesh = Mesh(world=world.size, dp=world.size // width, **{"tp" if tp_is_fast else "pp": width})
    lines = {axis: mesh.lines(axis) for axis in ("dp", "tp" if tp_is_fast else "pp")}
    data, model = (world.subgroup(of) for of in lines.values())
    net = HandCut(model, mark)
    given = [data, model]
    if dist.is_initialized():  # then as a script would make them
        given = [dist.new_group(list(g.members), use_local_synchronization=True) for g in given]
    optimizer = {"type": "AdamW", "params": {"lr": 0.01}}
    config = config_of(stage, MICROS // data.size, 0.5, optimizer=optimizer)
    engine, *_ = minispeed.initialize(model=net, config=config, mpu=mpu_of(*given, tensor=tp_is_fast))
    if first:
        engine.load_checkpoint(folder)
    norms = []
    for step in range(first, first + STEPS):
        for x in rows(step).chunk(data.size)[data.rank]:
            engine.backward(engine(x))
            engine.step()
        norms.append(engine.get_global_grad_norm())
    engine.save_checkpoint(folder)
    return norms, engine.train_batch_size()


def clipped(model: nn.Module, most: float) -> float:
    """Bring a gradient down to a norm, and return what it was: torch's own call adds 1e-6 to it."""
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    for p in model.parameters():
        p.grad *= most / norm if most and norm > most else 1.0
    return norm


def check_hand_cut(run: Any, ranks: int, widths: tuple[int, int], stage: int, tp_is_fast: bool, mark: str) -> None:
    alone = HandCut(SoloGroup())
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.01, weight_decay=0.0)
    norms = []
    for step in range(2 * STEPS):
        optimizer.zero_grad()
        alone(rows(step)).backward()
        norms.append(clipped(alone, 0.5))
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        for first, width in ((0, widths[0]), (STEPS, widths[1])):
            for got, batch in run(ranks, width, tp_is_fast, stage, folder, mark, first):
                assert got == pytest.approx(norms[first : first + STEPS], rel=1e-10)
                assert batch == MICROS * ROWS
        stored = Checkpoint(Path(folder) / f"global_step{2 * STEPS}")
        expected = {name: p.detach() for name, p in alone.named_parameters()}
        assert close({name: stored.tensor(f"parameters/{name}") for name in expected}, expected)


def on_threads(ranks: int, *args: Any) -> list[Any]:
    def enter(group):
        with inside(World(group, CPU)) as world:
            return cut_by_hand(world, *args)

    return run_threads(enter, ranks)


def on_processes(ranks: int, *args: Any) -> list[Any]:
    return shared_pool().run(cut_by_hand, *args, ranks=ranks)


widths = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))


@given(widths, st.integers(0, 3), st.booleans(), st.sampled_from(["tensor_model_parallel", "model_parallel"]))
@settings(max_examples=12)
def test_a_model_cut_by_hand_is_the_plain_loop_and_loads_under_another_cut(widths, stage, tp_is_fast, mark):
    check_hand_cut(on_threads, 4, widths, stage, tp_is_fast, mark)


def test_a_model_cut_by_hand_over_torchs_own_groups():
    check_hand_cut(on_processes, 4, (2, 4), 2, True, "tensor_model_parallel")


def hand_cut(rank: int, ranks: int, line: int = 2, config: dict[str, Any] | None = None, **more: Any) -> Any:
    """Start an engine for a model cut by hand over `line` neighbours."""
    mesh = Mesh(world=ranks, dp=ranks // line, tp=line)
    data, model = (current_world().subgroup(mesh.lines(axis)) for axis in ("dp", "tp"))
    optimizer = {"type": "SGD", "params": {"lr": 0.1}}
    config = config_of(0, 1, 0.0, optimizer=optimizer, **(config or {}))
    return minispeed.initialize(model=HandCut(model, **more), config=config, mpu=mpu_of(data, model))[0]


def test_slices_of_no_known_dim_train_and_are_in_no_checkpoint(tmp_path):
    def run(rank):
        engine = hand_cut(rank, 2, dims=False)
        engine.backward(engine(torch.ones(ROWS, WIDTH, dtype=torch.float64)))
        engine.step()
        assert engine.module_state_dict()["up"].shape == (FEATURES // 2, WIDTH)
        for call in (engine.save_checkpoint, engine.load_checkpoint):
            with pytest.raises(UserError, match="up is marked as a slice, and nothing says of which dim"):
                call(tmp_path)
        with pytest.raises(UserError, match="only its author can put its modules together"):
            engine.save_16bit_model(tmp_path)
        return engine.get_global_grad_norm()

    first, second = on_ranks(2, run)
    alone = on_ranks(1, lambda rank: _norm_alone(hand_cut(rank, 1, line=1)))[0]
    assert first == second == pytest.approx(alone, rel=1e-10)


def _norm_alone(engine: Any) -> float:
    engine.backward(engine(torch.ones(ROWS, WIDTH, dtype=torch.float64)))
    engine.step()
    return engine.get_global_grad_norm()


def test_an_mpu_that_does_not_fit_is_a_sentence():
    def of(ranks_of_data, ranks_of_model=None, ranks=4, **config):
        def run(rank):
            groups = [minispeed.comm.new_group(line) for line in (*ranks_of_data, *(ranks_of_model or []))]
            mine = [group for group in groups if group.rank >= 0]
            mpu = mpu_of(*mine) if ranks_of_model else SimpleNamespace(get_data_parallel_group=lambda: mine[0])
            config_ = config_of(0, 1, 0.0, optimizer={"type": "SGD", "params": {"lr": 0.1}}, **config)
            return minispeed.initialize(model=GPT(SMALL), config=config_, mpu=mpu)[0].core.layout.tp

        return on_ranks(ranks, run)

    pairs, others, every = [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 1, 2, 3]]
    with pytest.raises(UserError, match="mpu has 2 data-parallel x 1 model-parallel ranks, and the world 4"):
        of(pairs)
    with pytest.raises(UserError, match="mpu has 4 data-parallel x 2 model-parallel ranks"):
        of(every, pairs)
    with pytest.raises(UserError, match="without get_data_parallel_group"):
        on_ranks(1, lambda rank: minispeed.initialize(model=Net(), config={"train_batch_size": 1}, mpu=object()))
    # beside autotp_size it must say the same
    assert of(others, pairs, tensor_parallel={"autotp_size": 2}) == [2] * 4
    with pytest.raises(UserError, match=r"data-parallel group is of ranks \[., .\], with .* it is \[(0, 2|1, 3)\]"):
        of(pairs, others, tensor_parallel={"autotp_size": 2})
