"""A model that no rank ever holds whole starts with the same values: each rank reads its own slices of them."""

import pytest
import torch
from hypothesis import given, settings
from test_layouts import Case, cases

from minispeed.axes import Layout
from minispeed.census import Census, storage_bytes
from minispeed.collective.group import Group
from minispeed.collective.threads import run_threads
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.init import first_value
from minispeed.model.presets import preset
from minispeed.placement import WHOLE, Slice
from minispeed.precision import Precision

CPU = torch.device("cpu")
DOUBLE = Precision(torch.float64)


class Drawn:
    """A source that draws what it is asked for, and keeps nothing: what a built model would start from."""

    def __init__(self, config: GPTConfig, *, seed: int = 0, without: str = "") -> None:
        built = GPT(config, hollow_on=CPU)
        self.model_dim, self.num_layers, self.seed = config.model_dim, config.num_layers, seed
        self.shapes = {f"parameters/{name}": tuple(p.shape) for name, p in built.named_parameters() if name != without}
        self.alpha = built.deep.identity()

    def read(self, name: str, elements: Interval, part: Slice = WHOLE) -> torch.Tensor | None:
        if name not in self.shapes:
            return None
        own = name.partition("/")[2]
        value = first_value(self.seed, own, self.shapes[name], model_dim=self.model_dim, num_layers=self.num_layers)
        return part.of(self.alpha if own == "deep.alpha" else value).flatten()[slice(*elements)].clone()


def parameters(engine: Engine) -> dict[tuple, torch.Tensor]:
    """Return this rank's elements of each parameter, by name and place."""
    found = [piece for piece in engine.pieces() if piece.name.startswith("parameters/")]
    return {(piece.name, piece.elements, piece.part): piece.tensor.clone() for piece in found}


@given(cases())
@settings(print_blob=True)
def test_filled_slice_by_slice_it_is_the_model_that_was_built_whole(case: Case):
    source = Drawn(case.config, seed=case.seed)

    def same(group: Group) -> bool:
        how = {"layout": case.layout, "precision": DOUBLE, "zero": case.stage}
        built = Engine(GPT(case.config, seed=case.seed).to(torch.float64), group, **how)
        filled = Engine(GPT(case.config, hollow_on=CPU), group, source=source, **how)
        a, b = parameters(built), parameters(filled)
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    assert all(run_threads(same, case.ranks))


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"pp": 2, "tp": 2}])
def test_no_rank_ever_holds_more_than_it_keeps_and_one_unit(stage, layout):
    config = preset("nano", vocab_size=64, num_layers=6)
    source = Drawn(config)

    def most(group: Group) -> tuple[int, int]:
        with Census() as census:
            how = {"layout": Layout(**layout), "precision": Precision(torch.float32), "zero": stage}
            engine = Engine(GPT(config, hollow_on=CPU), group, source=source, **how)
        units = [unit for part in engine.parts for unit in part.units]
        kept = storage_bytes(unit.flat if unit.stage < 3 else unit.shard for unit in units)
        fused = [p.numel() for name, p in GPT(config, hollow_on=CPU).named_parameters() if name.endswith("qkv.weight")]
        cut_at_once = 4 * sum(fused) // engine.layout.tp if engine.layout.tp > 1 else 0  # slices of slices are copies
        return census.peak, kept + cut_at_once + 3 * 4 * max(unit.layout.size for unit in units) + 50_000

    size = 4 * sum(p.numel() for p in GPT(config).parameters())
    for peak, bound in run_threads(most, 4):
        assert peak <= bound < (size if stage or layout.keys() == {"pp", "tp"} else 2 * size)


def test_what_the_source_lacks_is_rank_zeros():
    config = preset("nano", vocab_size=64)
    source = Drawn(config, without="norm.weight")

    def norms(group: Group) -> torch.Tensor:
        model = GPT(config, hollow_on=CPU)
        model.norm.weight = torch.nn.Parameter(torch.full((config.model_dim,), 3.0 + group.rank))
        engine = Engine(model, group, source=source, precision=Precision(torch.float32))
        return dict(engine.model.named_parameters())["norm.weight"].detach().clone()

    assert all((found == 3.0).all() for found in run_threads(norms, 2))


def test_a_source_of_another_shape_is_refused():
    other = Drawn(preset("nano", vocab_size=65))
    with pytest.raises(UserError, match=r"embed.tokens.weight has the shape \(65, .*, \(64, "):
        Engine(GPT(preset("nano", vocab_size=64), hollow_on=CPU), source=other, precision=Precision(torch.float32))
