"""Laws of what a checkpoint holds: whoever wrote it, any layout reads it and trains on as if nothing had happened."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from minispeed.checkpoint import Checkpoint, save
from minispeed.collective.threads import run_threads
from minispeed.engine import Engine, MicroBatch
from minispeed.errors import UserError
from minispeed.optim import SGD, AdamW
from minispeed.precision import Precision
from minispeed.testing.measure import InMemory
from minispeed.testing.odd import OddConfig, OddModel

OPTIMIZERS = {
    "adamw": lambda groups: AdamW(groups, lr=1e-3),
    "momentum": lambda groups: SGD(groups, lr=1e-3, momentum=0.9),
    "plain": lambda groups: SGD(groups, lr=1e-3),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, momentum=0.5),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-3),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=1e-3),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=1e-3),
}
WHOLE = {**OPTIMIZERS, "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-3)}


def engine(group, stage, optimizer, seed):
    model = OddModel(OddConfig(dim=3, layers=2, frozen=True), seed=seed).to(torch.float64)
    return Engine(
        model,
        group,
        precision=Precision(torch.float64),
        zero=stage,
        lr=1e-3,
        weight_decay=0.1,
        optimizer=WHOLE[optimizer],
    )


def step(run, seed):
    """Train on my share of four rows, whatever the number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, 5, (4, 3), generator=generator) for _ in range(2))
    zeros = torch.zeros_like(tokens)
    whole = MicroBatch(tokens, labels, torch.arange(3).expand(4, 3).contiguous(), zeros, zeros)
    return run.train_step([MicroBatch(*(field.chunk(run.group.size)[run.group.rank] for field in whole))])


def parameters(run):
    with run.sharded.gathered():
        return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def check(optimizer, before, after, seed):
    (ranks, stage), (other_ranks, other_stage) = before, after
    with tempfile.TemporaryDirectory() as folder:

        def write(group):
            run = engine(group, stage, optimizer, seed)
            for index in range(2):
                step(run, seed + index)
            save(Path(folder) / "c", run.pieces(), {}, group)
            return step(run, seed + 2), parameters(run)

        def read(group):
            run = engine(group, other_stage, optimizer, seed + 1)
            run.load(Checkpoint(Path(folder) / "c"), step=2, num_updates=2)
            return step(run, seed + 2), parameters(run)

        straight, expected = run_threads(write, ranks)[0]
        for report, got in run_threads(read, other_ranks):
            assert report.norm == pytest.approx(straight.norm, rel=1e-10, abs=1e-10)
            for name, tensor in expected.items():
                assert (got[name] - tensor).abs().max() <= 1e-10 * max(1.0, tensor.abs().max().item()), name


layouts = st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 3))


@given(st.sampled_from(sorted(OPTIMIZERS)), layouts, layouts, st.integers(0, 2**31))
@settings(max_examples=30)
def test_any_layout_goes_on_from_any_other(optimizer, before, after, seed):
    check(optimizer, before, after, seed)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
@settings(max_examples=5)
def test_what_an_optimizer_of_whole_tensors_keeps_has_its_own_shapes(ranks, other_ranks, seed):
    check("adafactor", (ranks, 0), (other_ranks, 0), seed)


def test_parameters_alone_start_the_optimizer_anew():
    first, second = (engine(None, 0, "adamw", seed) for seed in (0, 1))
    step(first, 0)
    second.load(InMemory(first.pieces()), step=1, num_updates=1, with_optimizer=False)
    assert all(torch.equal(p, parameters(first)[name]) for name, p in parameters(second).items())
    assert not second.optimizer.state


def test_tensors_of_the_same_layout_are_read_into_their_places(tmp_path, monkeypatch):
    first, second = (engine(None, 0, "adamw", seed) for seed in (0, 1))
    step(first, 0)
    save(tmp_path / "c", first.pieces(), {})
    read, real = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *where: (read.append(name), real(self, name, *where))[1])
    second.load(Checkpoint(tmp_path / "c"), step=1, num_updates=1)
    assert {name.split("/")[1] for name in read} == {"group 0", "group 1"}
    assert all(torch.equal(p, parameters(first)[name]) for name, p in parameters(second).items())


def test_what_is_missing_is_named():
    first, second = (engine(None, 0, "adamw", seed) for seed in (0, 1))
    step(first, 0)
    pieces = first.pieces()
    missing = next(piece for piece in pieces if piece.name.startswith("parameters/"))
    with pytest.raises(UserError, match=f"holds no {missing.name}"):
        second.load(InMemory([p for p in pieces if p is not missing]), step=1, num_updates=1)
