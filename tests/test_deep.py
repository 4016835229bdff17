"""Laws of deep connections: at first a plain GPT to the bit, then the sums of their definition; covers are minimal."""

import random
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor

from minispeed.collective.group import Group, SoloGroup
from minispeed.collective.threads import run_threads
from minispeed.engine import Engine, MicroBatch
from minispeed.errors import UserError
from minispeed.model.cache import Cache
from minispeed.model.config import GPTConfig
from minispeed.model.connections import TOKENS, Connections, Cover, Entry, crossing, learned_entries, minimum_cover
from minispeed.model.deep import Outputs
from minispeed.model.generate import generate
from minispeed.model.gpt import GPT
from minispeed.model.loss import IGNORED
from minispeed.model.presets import preset
from minispeed.model.recompute import recompute
from minispeed.optim import decay_groups
from minispeed.placement import Replicated
from minispeed.precision import Precision
from minispeed.schedules import constant
from minispeed.tensor.parallel import tensor_parallel
from minispeed.tensor.plan import gpt_plan
from minispeed.testing.models import small_configs
from minispeed.testing.strategies import seeds
from minispeed.zero.init import GatheredParameters


def close(got: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal as the design page defines it."""
    return bool((got - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item()))


@st.composite
def deep_configs(draw: st.DrawFn, masks: tuple[str, ...] = ("x0", "unet", "dwa")) -> GPTConfig:
    """Draw a small GPT with deep connections, of one task or several."""
    mask, L = draw(st.sampled_from(masks)), draw(st.integers(3, 5))
    steps = dict(dilation=draw(st.integers(1, 3)), period=draw(st.integers(1, 3))) if mask == "dwa" else {}
    assume(mask == "none" or any(i > j for i, j in learned_entries(mask, L, **steps)))
    tasks = draw(st.integers(1, 3)) if mask != "none" else 1
    deep = {f"deep_{name}": step for name, step in steps.items()}
    return replace(draw(small_configs()), num_layers=L, deep=mask, deep_tasks=tasks, **deep)


def built(config: GPTConfig, seed: int) -> GPT:
    """Return a model in float64 whose connections are no longer the identity."""
    model = GPT(config, seed=seed).to(torch.float64)
    if model.deep.alpha is not None:
        with torch.no_grad():
            model.deep.alpha += torch.randn(model.deep.alpha.shape, generator=torch.Generator().manual_seed(seed)) / 2
    return model


def batch(config: GPTConfig, seed: int, length: int = 6) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Draw two rows, each of two documents; some tokens are not learnt, the last is padding of no task."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(0, config.vocab_size, (2, 2, length), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED
    tasks = torch.randint(0, config.deep_tasks, (2, length), generator=generator)
    documents = (torch.arange(length) >= length // 2).to(torch.int64).repeat(2, 1)
    labels[:, -1], tasks[:, -1], documents[:, -1] = IGNORED, -1, -1
    positions = torch.arange(length).repeat(2, 1) - (documents == 1) * (length // 2)
    return tokens, labels, {"positions": positions, "documents": documents, "tasks": tasks}


def plain(config: GPTConfig) -> GPTConfig:
    """Return the same shape without deep connections."""
    return replace(config, deep="none", deep_dilation=1, deep_period=1, deep_tasks=1)


def gradients(model: GPT, tokens: Tensor, labels: Tensor, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of each parameter, and the losses as one more."""
    losses = model(tokens, labels, **rows)
    losses.sum().backward()
    named = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return named | {"losses": losses.detach()}


# ---- the masks


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_dwa_has_the_entries_of_the_paper(L, dilation, period):
    entries = learned_entries("dwa", L, dilation=dilation, period=period)
    wanted = [(i, j) for i in range(1, L + 1) if i % period == 0 for j in range(i + 1) if (i - j) % dilation == 0]
    assert entries == wanted
    if dilation == period == 1:
        assert len(entries) == L * (L + 3) / 2


def test_x0_and_unet_join_whom_they_say():
    assert learned_entries("none", 5) == []
    assert learned_entries("x0", 4) == [(1, 0), (1, 1), (2, 0), (2, 2), (3, 0), (3, 3)]
    assert learned_entries("unet", 5) == [(3, 2), (3, 3), (4, 1), (4, 4)]  # blocks 2 -> 4 and 1 -> 5; 3 is the middle
    assert learned_entries("unet", 4) == [(3, 1), (3, 3)]  # 1 -> 4; 2 -> 3 has always been


# ---- covers


def fewest(entries: list[Entry]) -> list[Cover]:
    """Return every smallest set of rows and columns that has all entries, by trying all."""
    rows, columns = sorted({i for i, _ in entries}), sorted({j for _, j in entries})
    ends = [("row", i) for i in rows] + [("column", j) for j in columns]
    for size in range(len(ends) + 1):
        sets = [set(chosen) for chosen in combinations(ends, size)]
        found = [s for s in sets if all(("row", i) in s or ("column", j) in s for i, j in entries)]
        if found:
            return [
                Cover(*(tuple(sorted(n for kind, n in one if kind == want)) for want in ("column", "row")))
                for one in found
            ]
    raise AssertionError


def assert_is_the_cover(entries: list[Entry]) -> None:
    smallest = fewest(entries)
    most = max(len(cover.columns) for cover in smallest)
    assert [minimum_cover(entries)] == [cover for cover in smallest if len(cover.columns) == most]


def test_the_cover_of_every_small_mask_is_a_smallest_one():
    """All of the 1,024 masks of 4 x 4, at every cut: no smaller set, and the only one with as many columns."""
    places = [(i, j) for i in range(4) for j in range(i + 1)]
    cuts = {tuple(crossing(chosen, b)) for n in range(11) for chosen in combinations(places, n) for b in range(4)}
    for entries in cuts:
        assert_is_the_cover(list(entries))


@given(st.integers(1, 5), st.floats(0, 1), seeds)
def test_the_cover_of_a_drawn_mask_is_a_smallest_one(side, density, seed):
    drawn = random.Random(seed)
    assert_is_the_cover([entry for entry in product(range(side), range(side)) if drawn.random() < density])


def triangular(drawn: random.Random, side: int) -> list[Entry]:
    density = drawn.random()
    return [(i, j) for i in range(side) for j in range(i + 1) if drawn.random() < density]


@given(seeds)
def test_covers_nest_whatever_the_mask(seed):
    """100 masks a draw, cut everywhere: what a later bundle has of earlier columns, an earlier bundle has too; and the
    rows that an earlier one has begun, a later one goes on with until they are read."""
    drawn = random.Random(seed)
    for _ in range(100):
        side = drawn.randint(1, 10)
        entries = triangular(drawn, side)
        covers = [minimum_cover(crossing(entries, b)) for b in range(side)]
        for here, (columns, rows) in enumerate(covers):
            for there in range(here + 1, side):
                assert {j for j in covers[there].columns if j <= here} <= set(columns)
                assert {i for i in rows if i >= there} <= set(covers[there].rows)


@given(seeds)
def test_bundles_are_handed_on_whatever_the_mask(seed):
    """Small whole numbers, so that sums are exact in any order: what is read behind cuts is what is read without."""
    drawn = random.Random(seed)
    for _ in range(5):
        L = drawn.randint(1, 8)
        off = triangular(drawn, L + 1)
        rows = {i for i, _ in off}
        connections = Connections(L, sorted({*off, *((i, i) for i in rows)}))
        numbers = [torch.tensor([[[float(drawn.randint(-9, 9))]]]) for _ in range(L + 3)]
        weights = torch.tensor([[[float(drawn.randint(-9, 9)) for _ in connections.learned]]])
        alpha = torch.eye(L + 1)
        for (i, j), weight in zip(connections.learned, weights.flatten()):
            alpha[i, j] = weight
        outputs = Outputs(connections, weights, TOKENS, (numbers[-1],))
        for place, x in enumerate(numbers[:-1]):
            if drawn.random() < 0.5:
                bundle = outputs.bundle()
                assert len(bundle) == sum(map(len, connections.cover(place - 1)))
                outputs = Outputs(connections, weights, place - 1, bundle)
            if place:
                wanted = sum(alpha[place - 1, j] * numbers[j] for j in range(place)) if place <= L + 1 else numbers[-2]
                assert torch.equal(outputs.read(), wanted)
            outputs.add(x)
        assert outputs.bundle() == (numbers[-2],)


def test_what_nobody_reads_is_let_go():
    outputs = Outputs(Connections(9, []), None, TOKENS, (torch.zeros(1, 1),))
    for _ in range(11):
        outputs.add(torch.zeros(1, 1, 1))
        assert len(outputs.raw) == 1


# ---- the model


@given(deep_configs(), seeds)
def test_at_first_it_is_a_plain_gpt_to_the_bit(config, seed):
    step = batch(config, seed)
    got, wanted = gradients(GPT(config, seed=seed), *step), gradients(GPT(plain(config), seed=seed), *step)
    assert got.keys() - wanted.keys() == {"deep.alpha"}
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name


def by_definition(model: GPT, alpha: Tensor, tokens: Tensor, labels: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """Return the losses of a plain GPT whose layers read sums over all outputs before; alpha (B, T, L + 1, L + 1)."""
    outputs: list[Tensor] = []

    def summed(module, args):
        row = alpha[..., len(outputs) - 1, :, None]
        return sum(row[..., j, :] * x for j, x in enumerate(outputs)), *args[1:]

    for layer in [*model.blocks, model.norm]:
        layer.register_forward_pre_hook(summed)
    for layer in [model.embed, *model.blocks]:
        layer.register_forward_hook(lambda module, args, x: outputs.append(x))
    return model(tokens, labels, **rows)


@given(deep_configs(), seeds)
def test_a_layer_reads_the_sum_of_the_definition(config, seed):
    model, other = built(config, seed), built(plain(config), seed)
    tokens, labels, rows = batch(config, seed)
    learned, L = model.deep.connections.learned, config.num_layers
    own = model.deep.alpha.detach().clone().requires_grad_()
    sets = own.view(config.deep_tasks, len(learned))
    chosen = sets[rows["tasks"].clamp(min=0)]  # (B, T, E)
    alpha = torch.eye(L + 1, dtype=torch.float64).repeat(*tokens.shape, 1, 1)
    i, j = torch.tensor(learned).T
    alpha = alpha.index_put((torch.arange(2)[:, None, None], torch.arange(6)[:, None], i, j), chosen)
    losses = by_definition(other, alpha, tokens, labels, rows)
    losses.sum().backward()
    got = gradients(model, tokens, labels, rows)
    assert close(got["losses"], losses) and close(got["deep.alpha"], own.grad)
    for name, p in other.named_parameters():
        assert close(got[name], p.grad), name


@given(deep_configs(), st.sampled_from(["all", "2", "attention"]), seeds)
def test_recomputed_it_is_the_same(config, what, seed):
    model, step = built(config, seed), batch(config, seed)
    kept = gradients(model, *step)
    model.zero_grad()
    recompute(model, what)
    again = gradients(model, *step)
    assert all(torch.equal(again[name], gradient) for name, gradient in kept.items())


@given(deep_configs(), st.lists(st.integers(1, 4), min_size=1, max_size=3), seeds)
def test_features_through_the_cache_are_those_without(config, lengths, seed):
    model = built(config, seed)
    tokens, _, rows = batch(config, seed, sum(lengths))
    cache = Cache(sum(lengths))
    pieces = zip(*(x.split(lengths, dim=1) for x in (tokens, *rows.values())), strict=True)
    got = [model.features(piece[0], **dict(zip(rows, piece[1:])), cache=cache) for piece in pieces]
    assert close(torch.cat(got, dim=1), model.features(tokens, **rows))


def test_it_generates_what_it_would_read():
    model = built(preset("nano", deep="dwa", vocab_size=30), seed=3)
    (answer,) = generate(model, [[1, 2, 3]], stop=[], max_new=5)
    for k, token in enumerate(answer.tokens):
        assert model.logits(torch.tensor([[1, 2, 3, *answer.tokens[:k]]]))[0, -1].argmax() == token


def test_weights_of_connections_are_not_decayed():
    matrices, vectors = decay_groups(GPT(preset("nano", deep="x0")), 0.1)
    assert "deep.alpha" in vectors["names"] and "deep.alpha" not in matrices["names"]


# ---- cut over ranks


@settings(max_examples=20)
@given(deep_configs(), st.booleans(), seeds)
def test_cut_over_tp_its_gradient_is_the_whole_one(config, sequence, seed):
    config = replace(config, num_heads=4, num_kv_heads=2, hidden_dim=4)
    step = batch(config, seed)

    def run(group: Group) -> dict[str, Tensor]:
        model = built(config, seed)
        placement = tensor_parallel(model, gpt_plan(config), group, sequence_parallel=sequence)
        assert placement["deep.alpha"] == Replicated()
        return gradients(model, *step)

    wanted = gradients(built(config, seed), *step)
    first, second = run_threads(run, 2)
    assert torch.equal(first["deep.alpha"], second["deep.alpha"])
    assert close(first["losses"], wanted["losses"]) and close(first["deep.alpha"], wanted["deep.alpha"])


@pytest.mark.parametrize("stage", range(4))
def test_zero_trains_it_as_one_device_does(stage):
    config = preset("nano", num_layers=3, model_dim=8, num_heads=2, num_kv_heads=2, hidden_dim=4, deep="dwa")
    tokens, labels, rows = batch(config, seed=stage)
    micros = [MicroBatch(*fields) for fields in zip(*(x.split(1) for x in (tokens, labels, *rows.values())))]

    def run(group: Group) -> Tensor:
        model = built(config, seed=1)
        engine = Engine(model, group, precision=Precision(torch.float64), schedule=constant, lr=1e-3, zero=stage)
        for _ in range(3):
            engine.train_step(micros[group.rank :: group.size])
        with GatheredParameters([model.deep.alpha]):
            return model.deep.alpha.detach().clone()

    alone = run(SoloGroup())
    assert all(close(alpha, alone) for alpha in run_threads(run, 2))
    assert not close(alone, built(config, seed=1).deep.alpha)


# ---- mistakes


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"deep": "dense"}, "deep is 'dense', not one of none, x0, unet, dwa"),
        ({"deep": "x0", "deep_period": 2}, "deep_period 2 is of dwa, and deep is 'x0'; try: deep='dwa'"),
        ({"deep_dilation": 2}, "deep_dilation 2 is of dwa, and deep is 'none'"),
        ({"deep": "dwa", "deep_dilation": 0}, "deep_dilation counts at least 1, got 0"),
        ({"deep_tasks": 3}, "deep_tasks 3 choose among weights that deep 'none' has not"),
        ({"deep": "unet", "num_layers": 2}, "deep 'unet' connects nothing in 2 blocks; try: deep='none'"),
        ({"deep": "dwa", "deep_period": 5}, "deep 'dwa' connects nothing in 4 blocks"),
    ],
)
def test_connections_that_cannot_be_are_a_sentence(fields, says):
    with pytest.raises(UserError, match=says):
        preset("nano", **fields)


def test_tokens_without_tasks_are_a_sentence():
    model = GPT(preset("nano", deep="x0", deep_tasks=2))
    with pytest.raises(
        UserError, match=r"weights for each of 2 tasks, and .* without; try: tasks=..., \(1, 4\), each from"
    ):
        model.logits(torch.zeros(1, 4, dtype=torch.int64))


def test_a_config_from_before_is_a_plain_gpt():
    values = {name: value for name, value in preset("nano").to_dict().items() if not name.startswith("deep")}
    assert GPTConfig.from_dict(values) == preset("nano")
