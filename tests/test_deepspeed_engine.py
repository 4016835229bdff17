"""Laws of DeepSpeed's calls: whoever calls which of them in which way, the run is a plain loop's over all rows."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import minispeed
from minispeed.collective.threads import run_threads
from minispeed.collective.world import World, inside
from minispeed.errors import UserError

CPU = torch.device("cpu")
STEPS, ROWS, WIDTH = 3, 2, 4


class Net(nn.Module):
    """Returns its loss; `scale` is used outside its own module, `never` nowhere."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.scale = nn.Parameter(torch.ones(()))
        self.never = nn.Linear(2, 3)
        fill(self, seed)

    def forward(self, x):
        return ((self.layers(x) * self.scale - x) ** 2).mean()


def fill(model: nn.Module, seed: int) -> None:
    """Give parameters values that ranks which are threads draw alike: they share torch's default generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)


def rows(ranks: int, accumulation: int, step: int) -> torch.Tensor:
    """Draw the rows of a step, (accumulation, ranks, ROWS, WIDTH)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(accumulation, ranks, ROWS, WIDTH, generator=generator, dtype=torch.float64)


OPTIMIZERS = {
    "Adam": lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9),
}
PARAMS = {
    "Adam": dict(lr=0.01, betas=[0.9, 0.98], eps=1e-6, weight_decay=0.1),
    "AdamW": dict(lr=0.01, betas=[0.9, 0.98], eps=1e-6, weight_decay=0.1),
    "SGD": dict(lr=0.01, momentum=0.9),
}


def plain(optimizer: str, ranks: int, accumulation: int, clip: float, steps: int = STEPS):
    """Train as anybody would; return norms and parameters."""
    model = Net().to(torch.float64)
    trainer = OPTIMIZERS[optimizer](model.parameters())
    norms = []
    for step in range(steps):
        trainer.zero_grad()
        (sum(model(x) for x in rows(ranks, accumulation, step).flatten(0, 1)) / (ranks * accumulation)).backward()
        for p in model.parameters():  # what is never used has a gradient of zero here, as in DeepSpeed
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        for p in model.parameters():
            p.grad *= clip / norms[-1] if clip and norms[-1] > clip else 1.0
        trainer.step()
    return norms, {name: p.detach() for name, p in model.named_parameters()}


def on_ranks(ranks: int, fn):
    """Run a function of the rank inside a world of threads."""

    def enter(group):
        with inside(World(group, CPU)):
            return fn(group.rank)

    return run_threads(enter, ranks)


@dataclass(frozen=True)
class Way:
    """How a script may go about it."""

    forward: str  # through the engine, or the bare module
    backward: str  # engine.backward, or loss.backward
    optimizer: str  # in the configuration, brought, or made by a function
    accumulation: str  # counted by step, or told by set_gradient_accumulation_boundary


ways = st.builds(
    Way,
    forward=st.sampled_from(["engine", "module"]),
    backward=st.sampled_from(["engine", "own", "scaled"]),
    optimizer=st.sampled_from(["config", "brought", "function"]),
    accumulation=st.sampled_from(["counted", "told"]),
)


def config_of(stage: int, accumulation: int, clip: float, **more):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 30}
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        **more,
    }


def train(rank, way: Way, optimizer: str, stage: int, ranks: int, accumulation: int, clip: float):
    model = Net().to(torch.float64)
    config = config_of(stage, accumulation, clip)
    brought = None
    if way.optimizer == "config":
        config["optimizer"] = {"type": optimizer, "params": PARAMS[optimizer]}
    else:
        brought = OPTIMIZERS[optimizer] if way.optimizer == "function" else OPTIMIZERS[optimizer](model.parameters())
    engine, _, _, _ = minispeed.initialize(
        model=model, model_parameters=model.parameters(), optimizer=brought, config=config
    )
    norms = []
    for step in range(STEPS):
        for micro, x in enumerate(rows(ranks, accumulation, step)[:, rank]):
            if way.accumulation == "told":
                engine.set_gradient_accumulation_boundary(micro == accumulation - 1)
            loss = engine(x) if way.forward == "engine" else engine.module(x)
            if way.backward == "engine":
                engine.backward(loss)
            else:
                (engine.scale(loss) if way.backward == "scaled" else loss).backward()
            if way.accumulation == "counted" or micro == accumulation - 1:
                engine.step()
        norms.append(engine.get_global_grad_norm())
    assert engine.global_steps == STEPS and engine.skipped_steps == 0
    return norms, engine.module_state_dict()


@given(ways, st.sampled_from(sorted(OPTIMIZERS)), st.integers(0, 3), st.integers(1, 4), st.integers(1, 3),
       st.sampled_from([0.0, 0.1]))  # fmt: skip
@settings(max_examples=40)
def test_any_way_of_calling_is_the_plain_loop(way, optimizer, stage, ranks, accumulation, clip):
    norms, expected = plain(optimizer, ranks, accumulation, clip)
    for got_norms, got in on_ranks(ranks, lambda rank: train(rank, way, optimizer, stage, ranks, accumulation, clip)):
        assert got_norms == pytest.approx(norms, rel=1e-10, abs=1e-10)
        for name, tensor in expected.items():
            assert (got[name] - tensor).abs().max() <= 1e-10 * max(1, tensor.abs().max().item()), name


def made(stage: int = 0, accumulation: int = 1, model: nn.Module | None = None, **config):
    """Return an engine of one rank's net with SGD at rate 1, so that an update is the gradient."""
    settings_of = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, **config}
    model = model or Net().to(torch.float64)
    return minispeed.initialize(model=model, config=config_of(stage, accumulation, 0.0, **settings_of))[0]


def whole(engine):
    return {name: x.clone() for name, x in engine.module_state_dict().items()}


def close(got, expected, most=1e-10):
    return all((got[name] - x).abs().max() <= most * max(1, x.abs().max().item()) for name, x in expected.items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_set_by_hand_are_the_step(stage):
    """Their mean over ranks, whatever the accumulation."""

    def train(rank):
        engine = made(stage, accumulation=2)
        before = whole(engine)
        with engine.gathered():
            for p in engine.module.parameters():
                p.grad = torch.full_like(p, float(rank))
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        return all(torch.allclose(before[name] - 1.0, x) for name, x in whole(engine).items())

    assert on_ranks(3, train) == [True] * 3


@pytest.mark.parametrize("stage", [0, 1])
def test_no_sync_adds_up_on_each_rank(stage):
    def train(rank):
        engine = made(stage, accumulation=2)
        synced = made(stage, accumulation=2)
        one, two = rows(2, 2, 0)[:, rank]
        with engine.no_sync():
            engine.backward(engine(one))
            with pytest.raises(UserError, match="inside no_sync.*after"):
                engine.step()
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(engine(two))
        engine.step()
        for x in (one, two):
            synced.backward(synced(x))
            synced.step()
        return close(whole(engine), whole(synced))

    assert on_ranks(2, train) == [True] * 2


@pytest.mark.parametrize("stage", [0, 1])
def test_no_sync_sends_nothing(stage):
    def train(rank):
        engine = made(stage, accumulation=1, wall_clock_breakdown=True)
        trace = engine._reporter.trace
        engine.backward(engine(rows(2, 1, 0)[0, rank]))  # the first backward agrees on an order
        engine.zero_grad()
        trace.clear()
        with engine.no_sync():
            engine.backward(engine(rows(2, 1, 1)[0, rank]))
        inside = trace.count()
        engine.backward(engine(rows(2, 1, 2)[0, rank]))
        return inside, trace.count() > 0

    assert on_ranks(2, train) == [(0, True)] * 2


@pytest.mark.parametrize("stage", [2, 3])
def test_no_sync_is_refused_where_gradients_are_cut(stage):
    with pytest.raises(UserError, match=f"stage {stage}"), made(stage).no_sync():
        pass


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_engines_in_one_process(stage):
    """A generator's gradient runs through the critic, which must not learn from it."""

    class Critic(nn.Linear):
        def forward(self, x):
            return super().forward(x).mean()

    def nets():
        pair = nn.Linear(WIDTH, WIDTH).double(), Critic(WIDTH, 1).double()
        for net in pair:
            fill(net, 0)
        return pair

    def losses(maker, critic, x):
        yield lambda: critic(x) - critic(maker(x).detach())
        yield lambda: critic(maker(x))

    def train(rank):
        engines = [made(stage, model=net) for net in nets()]
        plain_nets = nets()
        for step in range(2):
            both = rows(2, 1, step)[0]
            for engine, loss in zip(reversed(engines), losses(*engines, both[rank])):
                engine.zero_grad()
                engine.backward(loss())
                engine.step()
            for net, *each in zip(reversed(plain_nets), *(losses(*plain_nets, x) for x in both)):
                for other in plain_nets:
                    other.zero_grad()
                (sum(loss() for loss in each) / 2).backward()
                with torch.no_grad():
                    for p in net.parameters():
                        p -= p.grad
        return all(close(whole(engine), dict(net.state_dict())) for engine, net in zip(engines, plain_nets))

    assert on_ranks(2, train) == [True] * 2


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("together", [True, False])
def test_models_that_return_several_losses(stage, together):
    class Two(Net):
        def forward(self, x):
            y = self.layers(x)
            return {"one": (y**2).mean(), "others": [(y - x).abs().mean()]}

    engine = made(stage, model=Two().double())
    expected = Two().double()
    x = rows(1, 1, 0)[0, 0]
    out = engine(x)
    if together:
        engine.backward(out["one"] + out["others"][0])
    else:
        engine.backward(out["one"], retain_graph=True)
        engine.backward(out["others"][0])
    engine.step()
    out = expected(x)
    (out["one"] + out["others"][0]).backward()
    assert close(whole(engine), {n: p - (0 if p.grad is None else p.grad) for n, p in expected.named_parameters()})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_grad_drops_what_was_added_up(stage):
    engine, fresh = made(stage, accumulation=2), made(stage, accumulation=2)
    x, y = rows(1, 2, 0)[:, 0]
    engine.backward(engine(x))
    engine.zero_grad()
    for each in (engine, fresh):
        each.set_gradient_accumulation_boundary(True)
        each.backward(each(y))
        each.step()
    assert close(whole(engine), whole(fresh), most=0)


def test_calls_out_of_order_are_sentences():
    engine = made()
    x = rows(1, 1, 0)[0, 0]
    with pytest.raises(UserError, match="no backward before it.*engine.backward"):
        engine.step()
    loss = engine(x)
    engine.backward(loss)
    with pytest.raises(UserError, match="second time.*retain_graph=True"):
        engine.backward(loss)
    with pytest.raises(UserError, match=r"shape \(2, 4\)"):
        engine.backward(engine.module.layers(x))
    engine.module.scale.grad = torch.ones((), dtype=torch.float64)
    with pytest.raises(UserError, match="after the backward.*safe_set_full_grad"):
        engine.step()


def test_without_an_optimizer_it_only_runs_forwards():
    engine, optimizer, loader, scheduler = minispeed.initialize(model=Net(), config={"train_batch_size": 1})
    assert (optimizer, loader, scheduler) == (None, None, None)
    loss = engine(torch.ones(2, WIDTH))
    for call in (lambda: engine.backward(loss), engine.step):
        with pytest.raises(UserError, match="has no optimizer"):
            call()


def test_what_is_not_the_engines_is_the_modules():
    engine = made(accumulation=3)
    assert engine.scale is not None and engine.layers is engine.module.layers
    assert not engine.eval().module.training and engine.train().module.layers.training
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (3 * ROWS, ROWS)
    assert (engine.gradient_accumulation_steps(), engine.gradient_clipping()) == (3, 0.0)
    assert (engine.fp16_enabled(), engine.bfloat16_enabled(), engine.zero_optimization_stage()) == (False, False, 0)
    assert [engine.is_gradient_accumulation_boundary() for engine.micro_steps in range(4)] == [
        False,
        False,
        True,
        False,
    ]
    assert engine.get_lr() == [1.0] and engine.get_mom() == [0.0] and engine.device == CPU
    with pytest.raises(AttributeError, match="no_such_thing"):
        engine.no_such_thing


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_destroy_gives_an_ordinary_module_back(stage):
    def train(rank):
        engine = made(stage)
        engine.backward(engine(rows(2, 1, 0)[0, rank]))
        engine.step()
        expected, module = whole(engine), engine.module
        engine.destroy()
        module(rows(2, 1, 1)[0, rank]).backward()
        again = made(stage, model=module)
        return all(type(p) is nn.Parameter for p in Net().parameters()) and close(whole(again), expected, most=0)

    assert on_ranks(2, train) == [True] * 2


@pytest.mark.parametrize("early", [{"prescale_gradients": True}, {"gradient_predivide_factor": 4.0}])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_when_gradients_are_divided_changes_nothing(stage, early):
    """Only how large they are on their way: with 3 ranks, a third or a quarter."""
    sent = []

    def train(rank):
        engine, late = made(stage, 2, **early), made(stage, 2)
        for each in (engine, late):
            for x in rows(3, 2, 0)[:, rank]:
                each.backward(each(x))
                each.step()
        assert engine.get_global_grad_norm() == pytest.approx(late.get_global_grad_norm(), rel=1e-12)
        sent.append(engine.core.predivide)
        return close(whole(engine), whole(late))

    assert on_ranks(3, train) == [True] * 3 and set(sent) == {3.0 if "prescale_gradients" in early else 4.0}
