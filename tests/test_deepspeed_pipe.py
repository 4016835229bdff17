"""Laws of DeepSpeed's pipelines: however a list of layers is cut, it is trained as a plain loop over it would."""

import tempfile
import zlib
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from safetensors.torch import load_file
from test_deepspeed_engine import on_ranks
from torch import nn
from torch.nn import functional as F

import minispeed
from minispeed.collective.threads import run_threads
from minispeed.collective.world import World, inside
from minispeed.deepspeed.pipe import PipelineModule
from minispeed.deepspeed.pipe_layers import LayerSpec, PipelineError, TiedLayerSpec
from minispeed.deepspeed.topology import PipeDataParallelTopology, PipeModelDataParallelTopology, ProcessTopology
from minispeed.errors import UserError
from minispeed.testing.pool import shared_pool

STEPS, B, D, V = 3, 2, 4, 7
ADAM = {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1}}
SGD = {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}}


# ---- layers, each for a tensor or for a tuple of which it changes the first


def on_first(function, x):
    return (function(x[0]), *x[1:]) if isinstance(x, tuple) else function(x)


class Mix(nn.Linear):
    def __init__(self, is_trained=True):
        super().__init__(D, D)
        self.requires_grad_(is_trained)

    def forward(self, x):
        return on_first(super().forward, x)


def tanh(x):
    return on_first(torch.tanh, x)


def in_place(x):
    return on_first(torch.relu_, x)


def pair(x):
    first = x[0] if isinstance(x, tuple) else x
    return first, (first > 0).long(), 0.5 * first


def single(x):
    return (x[0] if isinstance(x, tuple) else x,)


def join(x):
    return sum(x) if isinstance(x, tuple) else x


def add_mean(words, x):
    return on_first(lambda first: first + words.weight.mean(0), x)


def logits(words, x):
    return F.linear(join(x), words.weight)


def look_up(words, x):
    return words(x)


class Words(nn.Embedding):
    def __init__(self, is_trained):
        super().__init__(V, D)
        self.requires_grad_(is_trained)


FUNCTIONS = {"tanh": tanh, "in_place": in_place, "pair": pair, "single": single, "join": join}
TIED = {"add_mean": add_mean, "logits": logits, "look_up": look_up}
KINDS = ["mix", "mix", "plain", "again", "frozen", "add_mean", *FUNCTIONS]


def listed(kinds, fixed):
    """Return the list that a script would write down."""
    made, plain = [], None
    for kind in kinds:
        if kind in FUNCTIONS:
            made.append(FUNCTIONS[kind])
        elif kind in TIED:
            forward_fn = None if kind == "look_up" else TIED[kind]
            made.append(TiedLayerSpec("words", Words, is_trained=not fixed, forward_fn=forward_fn))
        elif kind in ("plain", "again"):
            plain = Mix() if plain is None or kind == "plain" else plain
            made.append(plain)
        else:
            made.append(LayerSpec(Mix, is_trained=kind != "frozen"))
    return made


class Plain(nn.Module):
    """The same layers, made and run without any of ours."""

    def __init__(self, kinds, fixed):
        super().__init__()
        self.tied_modules = nn.ModuleDict()
        self.calls, plain = [], None
        if {*kinds} & {*TIED}:
            self.tied_modules["words"] = Words(not fixed)
        for index, kind in enumerate(kinds):
            if kind in FUNCTIONS:
                self.calls.append(FUNCTIONS[kind])
            elif kind in TIED:
                self.calls.append(partial(TIED[kind], self.tied_modules["words"]))
            else:
                module = plain if kind == "again" and plain is not None else Mix(kind != "frozen")
                plain = module if kind in ("plain", "again") else plain
                self.add_module(str(index), module)
                self.calls.append(module)

    def forward(self, x):
        for call in self.calls:
            x = call(x)
        return x


@dataclass(frozen=True)
class Case:
    """One drawn list of layers, its rows, and who shares them how."""

    kinds: tuple[str, ...]
    start: str
    stages: int
    dp: int
    micros: int
    zero: int
    schedule: str = "1f1b"
    method: str = "parameters"
    interval: int = 0
    clip: float = 0.0
    optimizer: str = "adamw"
    fixed: bool = False  # the words
    seed: int = 0

    @property
    def ranks(self) -> int:
        return self.stages * self.dp

    @property
    def config(self):
        return {
            "train_micro_batch_size_per_gpu": B,
            "gradient_accumulation_steps": self.micros,
            "gradient_clipping": self.clip,
            "zero_optimization": {"stage": self.zero, "stage3_param_persistence_threshold": 0},
            "optimizer": {"adamw": ADAM, "sgd": SGD}[self.optimizer],
            "pipeline": {"schedule": self.schedule, "activation_checkpoint_interval": self.interval},
        }


def module(case, stages=None):
    loss_fn = F.cross_entropy if case.start == "words" else F.mse_loss
    return PipelineModule(
        listed(case.kinds, case.fixed), num_stages=stages or case.stages, loss_fn=loss_fn, partition_method=case.method
    ).double()


def possible(case):
    """Return the numbers of stages that each have something to train."""
    found = []
    for stages in range(1, min(4, len(case.kinds)) + 1):
        try:
            module(case, stages)
            found.append(stages)
        except UserError:
            pass
    return found


def can_split(case):
    """Whether each stage has a linear whose weight is trained."""
    linear = [kind in ("mix", "plain", "again", *(["logits"] if not case.fixed else [])) for kind in case.kinds]
    return all(any(linear[first:last]) for first, last in pairwise(module(case).parts))


@st.composite
def cases(draw):
    start = draw(st.sampled_from(["words", "rows", "tuples"]))
    middle = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))
    if start != "words":  # there is no embedding then
        middle = ["mix" if kind == "add_mean" else kind for kind in middle]
    ends = {
        "words": (["look_up"], ["mix", "logits"]),
        "rows": ([], ["mix", "join"]),
        "tuples": (["pair"], ["mix", "join"]),
    }
    kinds = tuple([*ends[start][0], *middle, *ends[start][1]])
    overwrites = (
        "mix",
        "plain",
        "again",
        "frozen",
        "look_up",
        "",
    )  # of other outputs the backward needs the old values
    before = zip(kinds, ("", *kinds))
    kinds = tuple("tanh" if kind == "in_place" and last not in overwrites else kind for kind, last in before)
    case = Case(
        kinds=kinds,
        start=start,
        stages=1,
        dp=draw(st.integers(1, 2)),
        micros=draw(st.integers(1, 4)),
        zero=draw(st.integers(0, 3)),
        schedule=draw(st.sampled_from(["1f1b", "gpipe", "zb_h1"])),
        method=draw(st.sampled_from(["parameters", "uniform", "type:words|mix"])),
        interval=draw(st.integers(0, 3)),
        clip=draw(st.sampled_from([0.0, 0.05])),
        optimizer=draw(st.sampled_from(["adamw", "sgd"])),
        fixed=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
    case = replace(case, stages=draw(st.sampled_from(possible(case)[::-1])))
    return case if case.schedule != "zb_h1" or can_split(case) else replace(case, schedule="1f1b")


def fill(model, seed):
    """Give parameters values by their names."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.4)
    return model


def rows(case, step):
    """Draw the (inputs, labels) of a step by micro-batch and replica."""
    generator = torch.Generator().manual_seed(case.seed + step)

    def draw():
        x = torch.randn(B, D, generator=generator, dtype=torch.float64)
        if case.start == "words":
            return tuple(torch.randint(V, (B,), generator=generator) for _ in range(2))
        return ((x, 2 * x) if case.start == "tuples" else x), x.flip(0)

    return [[draw() for _ in range(case.dp)] for _ in range(case.micros)]


def plain(case, steps=STEPS):
    """Train as anybody would; return losses, norms and parameters."""
    model = fill(Plain(case.kinds, case.fixed).double(), case.seed)
    loss_of = F.cross_entropy if case.start == "words" else F.mse_loss
    trained = [p for p in model.parameters() if p.requires_grad]
    make = {"adamw": partial(torch.optim.AdamW, betas=(0.9, 0.999)), "sgd": torch.optim.SGD}[case.optimizer]
    optimizer = make(trained, **case.config["optimizer"]["params"])
    losses, norms = [], []
    for step in range(steps):
        each = [(loss_of(model(copied(x)), y)) for of_micro in rows(case, step) for x, y in of_micro]
        loss = sum(each) / len(each)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.cat([p.grad.flatten() for p in trained]).norm().item())
        for p in trained:
            p.grad *= case.clip / norms[-1] if case.clip and norms[-1] > case.clip else 1.0
        optimizer.step()
    return losses, norms, {name: p.detach() for name, p in model.state_dict().items()}


def copied(x):
    return tuple(map(torch.clone, x)) if isinstance(x, tuple) else x.clone()


def engine_of(case, rank):
    """Initialize; only rank 0 has the values."""
    model = module(case)
    if rank == 0:
        fill(model, case.seed)
    return minispeed.initialize(model=model, config=case.config)[0]


def reader(case, engine, step):
    """Return what this rank reads of a step: only the first stage has inputs, only the last labels."""
    mine = [of_micro[engine.lines.dp.rank] for of_micro in rows(case, step)]
    if not engine.reads:
        return None
    return iter([(x if engine.is_first_stage() else None, y if engine.is_last_stage() else None) for x, y in mine])


def train(case, engine, steps):
    losses, norms = [], []
    for step in steps:
        losses.append(engine.train_batch(reader(case, engine, step)).item())
        norms.append(engine.get_global_grad_norm())
    return losses, norms


def close(a, b):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return a.shape == b.shape and (a - b).abs().max().item() <= 1e-10 * max(1.0, b.abs().max().item())


def check(case, ran):
    losses, norms, parameters = plain(case)
    for found in ran:
        assert close(found[0], losses), (found[0], losses)
        assert close(found[1], norms), (found[1], norms)
        assert found[2].keys() == parameters.keys()
        assert [name for name, x in parameters.items() if not close(found[2][name], x)] == []


# ---- training


@given(cases())
@example(Case(("mix", "mix", "in_place", "mix"), "rows", stages=1, dp=1, micros=1, zero=0, interval=2))
@example(Case(("mix", "plain", "again", "join"), "rows", stages=3, dp=1, micros=2, zero=2))
@example(Case(("look_up", "add_mean", "frozen", "logits"), "words", stages=2, dp=2, micros=1, zero=3, interval=1))
@settings(print_blob=True)
def test_every_cut_of_a_list_of_layers_is_the_plain_loop(case):
    def run(rank):
        engine = engine_of(case, rank)
        found = train(case, engine, range(STEPS))
        assert engine.global_steps == STEPS and engine.micro_steps == STEPS * case.micros
        return *found, engine.module_state_dict()

    check(case, on_ranks(case.ranks, run))


@given(cases())
@settings(max_examples=8, print_blob=True)
def test_a_checkpoint_goes_on_with_another_number_of_stages(case):
    """One step under the case's layout, two more under another, are three of a plain loop."""
    other = replace(case, stages=possible(case)[case.seed % len(possible(case))], zero=3 - case.zero, schedule="1f1b")
    with tempfile.TemporaryDirectory() as folder:

        def begin(rank):
            engine = engine_of(case, rank)
            found = train(case, engine, [0])
            engine.save_checkpoint(folder, client_state={"epoch": 1})
            return found

        def go_on(rank):
            engine = engine_of(other, rank)
            _, client = engine.load_checkpoint(folder)
            assert client == {"epoch": 1} and engine.global_steps == 1
            return *train(other, engine, [1, 2]), engine.module_state_dict()

        ((loss,), (norm,)), *_ = on_ranks(case.ranks, begin)
        ran = on_ranks(other.ranks, go_on)
    check(case, [([loss, *losses], [norm, *norms], state) for losses, norms, state in ran])


def test_processes_over_gloo_too():
    case = Case(("look_up", "mix", "pair", "again", "logits"), "words", stages=2, dp=1, micros=3, zero=2)
    check(case, shared_pool().run(train_as_a_process, case, ranks=2))


def train_as_a_process(world, case):
    engine = engine_of(case, world.rank)
    return *train(case, engine, range(STEPS)), engine.module_state_dict()


PAIRED = Case(("look_up", "mix", "pair", "again", "logits"), "words", stages=3, dp=2, micros=2, zero=1)


@pytest.mark.parametrize("place", ["module", "config"])
@pytest.mark.parametrize("interval", [0, 1, 2])
def test_layers_are_recomputed_in_groups_from_the_stages_first(interval, place):
    """A layer runs forward twice where it is recomputed: in groups, and those without parameters not."""
    calls = []

    def run(rank):
        layers = [lambda x: calls.append("free") or x, LayerSpec(Mix), LayerSpec(Mix), LayerSpec(Mix)]
        settings = {"activation_checkpoint_interval": interval}
        more = settings if place == "module" else {}
        model = PipelineModule(layers, num_stages=1, loss_fn=F.mse_loss, **more)
        model.layers[2].module.register_forward_pre_hook(lambda module, args: calls.append("mix"))
        config = {"train_batch_size": 1, "optimizer": SGD, "pipeline": {} if more else settings}
        engine, *_ = minispeed.initialize(model=model, config=config)
        engine.train_batch(iter([(torch.ones(1, D), torch.ones(1, D))]))

    on_ranks(1, run)
    assert calls.count("mix") == (2 if interval else 1)
    assert calls.count("free") == (2 if interval == 2 else 1)


def test_only_checkpointable_layers_are_recomputed():
    calls = []
    counted = lambda function, *tensors: calls.append(len(tensors)) or function(*tensors)  # noqa: E731
    settings = dict(loss_fn=F.mse_loss, activation_checkpoint_interval=1, activation_checkpoint_func=counted)
    layers = [nn.Linear(D, D), pair, Mix(), join]
    for names, expected in ((None, [1, 3]), (["Mix"], [3]), (["Mix", "pair"], [1, 3]), ([], [])):
        calls.clear()
        PipelineModule(layers, num_stages=1, checkpointable_layers=names, **settings)(torch.ones(1, D))
        assert calls == expected


def test_seeded_layers_are_drawn_and_dropped_out_alike_on_any_stages():
    """By their number, whatever else was drawn before; the forward's seed differs from forward to forward."""
    layers = [LayerSpec(nn.Linear, D, D), nn.Dropout(0.5), LayerSpec(nn.Linear, D, D)]

    def run(stages):
        torch.manual_seed(stages)
        model = PipelineModule(layers, num_stages=stages, loss_fn=F.mse_loss, seed_layers=True, base_seed=7)
        config = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "optimizer": SGD}
        engine, *_ = minispeed.initialize(model=model, config=config)
        batch = torch.ones(1, D), torch.zeros(1, D)
        return [engine.train_batch(iter([batch, batch])).item() for _ in range(3)]

    one = on_ranks(1, lambda rank: run(1))[0]
    assert one == pytest.approx(run_in_turn(2, lambda: run(2)), rel=1e-6)
    torch.manual_seed(7)
    first = nn.Linear(D, D)
    torch.manual_seed(9)
    last = nn.Linear(D, D)
    outputs = []
    for number in (2, 3):
        torch.manual_seed(7 * number + 1)
        outputs.append(F.mse_loss(last(F.dropout(first(torch.ones(1, D)))), torch.zeros(1, D)).item())
    assert one[0] == pytest.approx(sum(outputs) / 2, rel=1e-6)


def run_in_turn(ranks, fn):
    """Run on threads that take turns, for they share torch's generator."""

    def enter(group):
        with inside(World(group, torch.device("cpu"))):
            return fn()

    return run_threads(enter, ranks, lockstep=True)[0]


@pytest.mark.parametrize("stages", [1, 2])
def test_a_loss_with_weights_and_layers_with_buffers_are_trained_and_saved(stages, tmp_path):
    """What runs on the last stage alone is in the whole state, on every rank, and in a checkpoint of another layout."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(D))

        def forward(self, output, labels):
            return ((output * self.scale - labels) ** 2).mean()

    def run(stages, load):
        layers = [nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D), nn.BatchNorm1d(D)]
        model = fill(PipelineModule(layers, num_stages=stages, loss_fn=Loss()).double(), 3)
        config = {"train_batch_size": B, "optimizer": SGD, "zero_optimization": {"stage": 1}}
        engine, *_ = minispeed.initialize(model=model, config=config)
        if load:
            engine.load_checkpoint(tmp_path)
        x = torch.arange(2.0 * D, dtype=torch.float64).view(2, D)
        engine.train_batch(iter([(x, x.flip(0))]))
        if not load:
            engine.save_checkpoint(tmp_path)
        return engine.module_state_dict()

    twice = [on_ranks(1, lambda rank: (run(1, False), run(1, True)))[0][1]]
    on_ranks(stages, lambda rank: run(stages, False))
    twice += on_ranks(3 - stages, lambda rank: run(3 - stages, True))
    assert twice[0]["3.num_batches_tracked"] == 2 and not torch.equal(twice[0]["loss_fn.scale"], torch.ones(D))
    for state in twice:
        assert state.keys() == twice[0].keys()
        assert all(close(x, twice[0][name]) for name, x in state.items())


def test_the_whole_state_can_be_put_back_on_any_stages(tmp_path):
    whole = plain(PAIRED, steps=2)[2]

    def run(case, rank):
        engine = engine_of(case, rank)
        engine.load_module_state_dict({name: x + 1 for name, x in whole.items()})
        found = engine.state_dict()
        assert engine.save_16bit_model(tmp_path, f"{case.stages}.safetensors")
        with pytest.raises(UserError, match="the state dict lacks 1.bias"):
            engine.load_module_state_dict({"1.weight": whole["1.weight"]})
        with pytest.raises(UserError, match="the module lacks other"):
            engine.load_module_state_dict({**whole, "other": torch.ones(1)})
        engine.load_module_state_dict({"1.bias": torch.zeros(D), "other": torch.ones(1)}, strict=False)
        return found, engine.module_state_dict(exclude_frozen_parameters=True)

    for case in (PAIRED, replace(PAIRED, stages=1, zero=3)):
        if case.zero == 3:
            case.config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        for found, after in on_ranks(case.ranks, partial(run, replace(case, zero=2))):
            assert found.keys() == {f"module.{name}" for name in whole}
            assert all(torch.equal(found[f"module.{name}"], x + 1) for name, x in whole.items())
            assert not after["1.bias"].any() and torch.equal(after["1.weight"], whole["1.weight"] + 1)
        stored = load_file(tmp_path / f"{case.stages}.safetensors")
        assert stored.keys() == whole.keys() and torch.equal(stored["1.weight"], whole["1.weight"] + 1)


# ---- evaluation


@given(cases())
@settings(max_examples=8, print_blob=True)
def test_evaluation_is_the_forward_alone(case):
    expected = plain(case, steps=1)[0][0]
    model = fill(Plain(case.kinds, case.fixed).double(), case.seed)
    outputs = [[model(copied(x)).detach() for x, _ in of_micro] for of_micro in rows(case, 0)]

    def run(rank):
        engine = engine_of(case, rank)
        loss, output = engine.eval_batch(reader(case, engine, 0), return_logits=True)
        assert close(loss, expected)
        mine = [each[engine.lines.dp.rank] for each in outputs]
        lone = engine.eval_batch(reader(case, engine, 0), bcast_loss=False)
        mean = engine.eval_batch(reader(case, engine, 0), compute_loss=False)
        each = engine.eval_batch(reader(case, engine, 0), compute_loss=False, reduce_output=None)
        fewer = engine.eval_batch(reader(case, engine, 0), num_micro_batches=1, compute_loss=False, reduce_output=None)
        if not engine.is_last_stage():
            assert [output, lone, mean, each, fewer] == [None] * 5
        else:
            assert close(output, mine[-1]) and close(lone, expected)
            assert close(mean, sum(map(sum, outputs)) / (case.micros * case.dp))
            assert len(each) == case.micros and all(map(close, each, mine)) and close(fewer[0], mine[0])
        assert not engine.module.training and engine.global_steps == 0
        return *train(case, engine, range(STEPS)), engine.module_state_dict()

    check(case, on_ranks(case.ranks, run))


def test_a_model_without_loss_fn_returns_its_loss():
    def run(rank):
        layers = [nn.Linear(D, D), nn.Linear(D, 1), lambda x: x.mean()]
        model = fill(PipelineModule(layers, num_stages=2).double(), 1)
        engine, *_ = minispeed.initialize(model=model, config={"train_batch_size": 1, "optimizer": SGD})
        x = torch.ones(1, D, dtype=torch.float64)
        return engine.eval_batch(iter([(x, None)])).item(), engine.train_batch(iter([(x, None)])).item()

    for before, loss in on_ranks(2, run):
        assert before == loss


# ---- what is read


def test_a_dataset_is_read_in_its_own_order_over_and_over():
    seen = []

    def run(rank):
        rows = [(torch.full((D,), float(row)), torch.zeros(D)) for row in range(4)]
        loss_fn = lambda output, labels: output.mean()  # noqa: E731
        model = PipelineModule([nn.Linear(D, D), nn.Linear(D, D)], num_stages=2, loss_fn=loss_fn)
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 3, "optimizer": SGD}
        engine, _, loader, _ = minispeed.initialize(model=model, config=config, training_data=rows)
        engine.set_batch_fn(lambda batch: seen.append((engine.stage_id, batch[0][0, 0].item())) or batch)
        for _ in range(2):
            engine.train_batch()
        assert loader is engine.training_dataloader and isinstance(loader, minispeed.RepeatingLoader)
        return engine.train_batch_size()

    assert on_ranks(2, run) == [3, 3]
    for stage in range(2):
        assert [row for at, row in seen if at == stage] == [0, 1, 2, 3, 0, 1]


def test_replicas_read_rows_of_their_own_and_middle_stages_none():
    seen = []

    def run(rank):
        model = PipelineModule([nn.Linear(D, D) for _ in range(3)], num_stages=3, loss_fn=F.mse_loss)
        config = {"train_batch_size": 2, "optimizer": SGD}
        rows = [(torch.full((D,), float(row)), torch.zeros(D)) for row in range(4)]
        engine, _, loader, _ = minispeed.initialize(model=model, config=config, training_data=rows)
        assert (loader is None) == (engine.stage_id == 1) and not engine.is_gradient_accumulation_boundary()
        engine.set_batch_fn(lambda batch: seen.append((rank, batch[0][0, 0].item())) or batch)
        engine.train_batch()
        engine.set_dataloader([(torch.full((1, D), 9.0), torch.zeros(1, D))])
        engine.train_batch()

    on_ranks(6, run)
    assert sorted(seen) == [(rank, row) for rank, first in ((0, 0), (1, 1), (4, 0), (5, 1)) for row in (first, 9)]


# ---- half precision, schedules, printing


@pytest.mark.parametrize("stages", [1, 2])
def test_a_loss_scale_that_overflows_skips_the_step_on_every_stage(stages, capsys):
    def run(rank):
        model = fill(PipelineModule([nn.Linear(D, D), nn.Linear(D, D)], num_stages=stages, loss_fn=F.mse_loss), 2)
        fp16 = {"enabled": True, "auto_cast": True, "initial_scale_power": 24, "hysteresis": 1}
        warm_up = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4}}
        config = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "fp16": fp16, "optimizer": SGD}
        config |= {"scheduler": warm_up, "wall_clock_breakdown": True, "steps_per_print": 1}
        engine, _, _, schedule = minispeed.initialize(model=model, config=config)
        batch = torch.ones(1, D), torch.zeros(1, D, dtype=torch.float16)
        losses = [engine.train_batch(iter([batch, batch])).item() for _ in range(30)]
        assert 0 < engine.skipped_steps < 30 and engine.optimizer.cur_scale == 2.0 ** (24 - engine.skipped_steps)
        assert schedule.last_batch_iteration == 29 - engine.skipped_steps
        return losses

    losses = on_ranks(stages, run)
    assert losses[0] == losses[-1] and losses[0][-1] < losses[0][0]
    assert "step=30" in (printed := capsys.readouterr().out) and "forward" in printed and "backward" in printed


# ---- what is refused


def start(layers, stages=1, ranks=None, config={}, **settings):
    """Initialize on threads."""

    def run(rank):
        model = PipelineModule(layers, num_stages=stages, **settings)
        engine, *_ = minispeed.initialize(model=model, config={"train_batch_size": 12, "optimizer": SGD, **config})
        return engine

    return on_ranks(ranks or stages, run)[0]


LINEARS = [LayerSpec(nn.Linear, D, D) for _ in range(3)]
WRONG = {
    "3 layers cannot fill 4 stages": lambda: start(LINEARS, 4),
    "pp 2 .* and the world has 3": lambda: start(LINEARS, 2, ranks=3),
    "'type:attention' matches none of the layers; try: one of Linear": lambda: start(
        LINEARS, partition_method="type:attention"
    ),
    "partition_method is 'profile'": lambda: start(LINEARS, partition_method="profile"),
    r"stage 1 of 2 would have layers 1 to 1 \(tanh\), in which nothing is trained": lambda: start(
        [nn.Linear(D, D), torch.tanh], 2
    ),
    "without a number of stages": lambda: PipelineModule(LINEARS),
    "layer 1 is a int": lambda: start([nn.Linear(D, D), 3]),
    "layer 0 is a PipelineModule": lambda: start([PipelineModule(LINEARS, 1)]),
    "LayerSpec got <built-in": lambda: LayerSpec(torch.tanh),
    "layer 0 ties 'wait', which a Linear has not": lambda: start(
        [TiedLayerSpec("key", nn.Linear, D, D, tied_weight_attr="wait")]
    ),
    "has no optimizer": lambda: start(LINEARS, config={"optimizer": None}),
    "only train_batch is accessible|by themselves": lambda: start(LINEARS)(torch.ones(1, D)),
    '"pipeline.stages" is 2': lambda: start(LINEARS, config={"pipeline": {"stages": 2}}),
    "topology is {'pipe': 1, 'data': 2}": lambda: start(
        LINEARS, None, ranks=1, topology=PipeDataParallelTopology(num_pp=1, num_dp=2)
    ),
    "topology is {'data': 2, 'pipe': 2}": lambda: start(
        LINEARS, None, ranks=4, topology=ProcessTopology(["data", "pipe"], [2, 2])
    ),
    "topology is {'pipe': 2, 'data': 1, 'model': 2}": lambda: start(
        LINEARS, None, ranks=4, topology=PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)
    ),
    'a PipelineModule and "tensor_parallel"': lambda: start(
        LINEARS, 1, ranks=2, config={"tensor_parallel": {"autotp_size": 2}}
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_named(what):
    with pytest.raises(UserError, match=what):
        WRONG[what]()


def test_a_parameter_in_no_layer_is_named():
    class Net(PipelineModule):
        def __init__(self):
            super().__init__(LINEARS, num_stages=1, loss_fn=F.mse_loss)
            self.extra = nn.Linear(D, D)

    with pytest.raises(UserError, match="extra.weight is in no layer"):
        minispeed.initialize(model=Net(), config={"train_batch_size": 1, "optimizer": SGD})


def test_a_model_born_in_pieces_is_refused():
    with minispeed.zero.Init():
        model = PipelineModule(LINEARS, num_stages=1, loss_fn=F.mse_loss)
    with pytest.raises(UserError, match="inside zero.Init"):
        minispeed.initialize(model=model, config={"train_batch_size": 1, "optimizer": SGD})


BATCH = torch.ones(1, D), torch.ones(1, D)
READS = {
    "ended after 1 micro-batches, and a step takes 2": lambda: iter([BATCH]),
    "a list, which has no next micro-batch": lambda: [BATCH, BATCH],
    "a micro-batch is a tuple of 3": lambda: iter([(*BATCH, 1)] * 2),
    "has nothing to read": lambda: None,
}


@pytest.mark.parametrize("what", READS)
def test_every_rank_learns_what_is_wrong_with_the_rows_of_one(what):
    """And can go on: nothing was sent."""

    def run(rank):
        model = PipelineModule(LINEARS, num_stages=3, loss_fn=F.mse_loss)
        config = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "optimizer": SGD}
        engine, *_ = minispeed.initialize(model=model, config=config)
        with pytest.raises(UserError, match=what if rank == 2 else "another rank could not read"):
            engine.train_batch(READS[what]() if rank == 2 else iter([BATCH] * 2))
        return engine.train_batch(iter([BATCH] * 2)).item()

    losses = on_ranks(3, run)
    assert losses == [losses[0]] * 3


def test_a_loss_must_be_one_number():
    engine = start(LINEARS, loss_fn=None)
    with pytest.raises(UserError, match=r"a loss of shape \(12, 4\), not one number; try: .*loss_fn"):
        engine.train_batch(iter([(torch.ones(12, D), None)]))


def test_what_goes_on_to_a_stage_is_tensors():
    class Listed(nn.Linear):
        def forward(self, x):
            return [super().forward(x)]

    def run(rank):
        model = PipelineModule([Listed(D, D), nn.Linear(D, D)], num_stages=2, loss_fn=F.mse_loss)
        engine, *_ = minispeed.initialize(model=model, config={"train_batch_size": 1, "optimizer": SGD})
        engine.train_batch(iter([BATCH]))

    with pytest.raises(UserError, match="layer 0 returned a list"):
        on_ranks(2, run)


def test_a_pipeline_steps_only_as_a_whole():
    engine = start(LINEARS, loss_fn=F.mse_loss)
    for call in (engine.forward, engine.backward, engine.step, engine.no_sync):
        with pytest.raises(PipelineError, match="train_batch or eval_batch"):
            call()
    with pytest.raises(PipelineError, match="eval_batch"), torch.no_grad():
        engine.train_batch(iter([BATCH]))


# ---- topologies


def test_the_grid_is_where_the_topology_says():
    def run(rank):
        model = PipelineModule(LINEARS, num_stages=2, loss_fn=F.mse_loss)
        engine, *_ = minispeed.initialize(model=model, config={"train_batch_size": 3, "optimizer": SGD})
        grid, topology = engine.grid, engine.grid.topology()
        at = topology.get_coord(rank)
        assert grid.get_global_rank() == rank == grid.stage_to_global(at.pipe)
        assert (grid.get_pipe_parallel_rank(), grid.get_data_parallel_rank()) == (at.pipe, at.data)
        assert list(grid.get_pipe_parallel_group().members) in topology.get_axis_comm_lists("pipe")
        assert list(grid.get_data_parallel_group().members) in topology.get_axis_comm_lists("data")
        assert (grid.get_pipe_parallel_world_size(), grid.get_data_parallel_world_size()) == (2, 3)
        assert (grid.get_slice_parallel_rank(), grid.get_slice_parallel_world_size()) == (0, 1)
        assert grid.get_slice_parallel_group().members == (rank,)

    on_ranks(6, run)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_a_topology_numbers_a_box(dims):
    axes = ["pipe", "data", "model"][: len(dims)]
    topology = ProcessTopology(axes, dims)
    assert sorted(topology.mapping.values()) == list(range(topology.world_size()))
    for rank in range(topology.world_size()):
        coord = topology.get_coord(rank)._asdict()
        assert topology.get_rank(**coord) == rank
        for axis in axes:
            assert rank in topology.get_axis_list(axis, coord[axis])
            (line,) = [line for line in topology.get_axis_comm_lists(axis) if rank in line]
            assert [topology.get_rank(**{**coord, axis: place}) for place in range(topology.get_dim(axis))] == line
    assert topology.get_dim("none") == 0 and topology.get_axis_comm_lists("none") == []
    with pytest.raises(UserError, match="no axis is called 'pipes'; try: pipe"):
        topology.get_rank(pipes=0)
    with pytest.raises(UserError, match=f"rank {topology.world_size()} of"):
        topology.get_coord(topology.world_size())


def test_a_topology_says_the_number_of_stages():
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=1, num_dp=1)
    assert topology.get_rank_repr(1) == "model_00"
    engine = start(LINEARS, None, ranks=2, topology=topology)
    assert engine.module.num_pipeline_stages() == 2 and engine.module.partitions() == engine.module.parts
    assert [engine.module.stage_owner(layer) for layer in range(3)] in ([0, 0, 1], [0, 1, 1])


@pytest.mark.parametrize(
    ("method", "costs", "parts"),
    [("uniform", [1] * 4, [0, 2, 4]), ("parameters", [6, 0, 0, 27], [0, 3, 4]), ("type:LIN", [1, 0, 1, 1], [0, 2, 4])],
)
def test_stages_are_balanced_as_the_method_says(method, costs, parts):
    """By number, by trained parameters, by those whose class has the name."""
    layers = [LayerSpec(nn.Linear, 2, 2), torch.relu, nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 9)]
    model = PipelineModule(layers, num_stages=2, partition_method=method)
    assert model.costs == costs and model.parts == parts


def test_the_configuration_chooses_the_schedule():
    engine = start([nn.LayerNorm(D)], config={"pipeline": {"schedule": "zb_h1"}}, loss_fn=F.mse_loss)
    with pytest.raises(UserError, match="backward in two halves"):
        engine.train_batch(iter([BATCH]))
