"""Laws of dropout: what is dropped depends on where an element stands and on nothing else, and only training drops.

That no layout changes it is a law of tests/laws/test_layouts.py.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from minispeed.__main__ import main
from minispeed.axes import Layout
from minispeed.chat.chat_model import ChatModel
from minispeed.chat.evaluate import micro_batches
from minispeed.chat.pack import Batch
from minispeed.collective.group import SoloGroup
from minispeed.collective.threads import run_threads
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.model.attention import fused, reference, tiled
from minispeed.model.config import GPTConfig
from minispeed.model.dropout import (
    ATTENTION,
    EMBEDDING,
    MLP,
    PARTS,
    Dropout,
    Dropping,
    cells_of,
    number_of,
    numbered,
)
from minispeed.model.generate import generate
from minispeed.model.gpt import GPT
from minispeed.model.init import seed_of
from minispeed.model.mask import Mask
from minispeed.model.recompute import recompute
from minispeed.precision import Precision
from minispeed.runner import MicroBatch
from minispeed.sequence.cut import cut_sequence
from minispeed.tensor.parallel import tensor_parallel
from minispeed.testing.measure import InMemory
from minispeed.testing.strategies import seeds

SIZES = dict(vocab_size=11, max_positions=16, num_layers=2, model_dim=6, num_heads=4, num_kv_heads=2, head_dim=2)
SMALL = GPTConfig(**SIZES, hidden_dim=6)
DROPPING = replace(SMALL, dropout=0.3, attention="reference", attention_dropout=0.4)
shares = st.sampled_from([0.1, 0.5, 0.9])


def dropout(p: float, seed: int, step: int, rows: int, num_tokens: int) -> Dropout:
    """Return what a step drops of rows of a stream."""
    made, _ = Dropping(stream=p, weights=0.0, num_heads=1, seed=seed)(cells_of(range(rows), num_tokens), step)
    assert made is not None
    return made


def kept(found: Dropout, width: int) -> Tensor:
    """Return, in float64, which elements are kept.  (B, T, width)"""
    return 1 - found.dropped(slice(None), slice(0, width)).to(torch.float64)


def assert_independent(a: Tensor, b: Tensor, p: float) -> None:
    """Look at the correlation of two drawings, whose standard deviation is 1 / sqrt(n)."""
    correlation = ((a - (1 - p)) * (b - (1 - p))).mean().item() / (p * (1 - p))
    assert abs(correlation) <= 5 / math.sqrt(a.numel())


# ---- what is drawn


def test_the_generator_is_splitmix64_as_published():
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [n % 2**64 for n in numbered(1234567, torch.arange(1, 5)).tolist()] == expected


@given(shares, seeds)
@settings(max_examples=10)
def test_the_share_that_is_kept_is_asked_for_and_the_mean_stays(p, seed):
    found = dropout(p, seed, 0, 8, 64)
    mask = kept(found, 64)
    for over in ((0, 1, 2), (0, 1), (1, 2), (0, 2)):  # of all, of each feature, of each row, of each column
        share, number = mask.mean(dim=over), mask.numel() / mask.mean(dim=over).numel()
        sigmas = 5 if share.dim() == 0 else 6  # of very many shares one may be further off
        assert ((share - (1 - p)).abs() <= sigmas * math.sqrt(p * (1 - p) / number)).all()
    out = found(torch.ones(8, 64, 64, dtype=torch.float64))
    assert abs(out.mean().item() - 1) <= 5 * math.sqrt(p / (1 - p) / mask.numel())
    assert (out[mask == 1] == PARTS / (PARTS - round(p * PARTS))).all() and (out[mask == 0] == 0).all()


@given(shares, seeds)
@settings(max_examples=10)
def test_steps_seeds_places_rows_columns_and_features_are_independent(p, seed):
    found = dropout(p, seed, 5, 8, 64)
    mask = kept(found, 64)
    assert_independent(mask, kept(dropout(p, seed, 6, 8, 64), 64), p)
    assert_independent(mask, kept(dropout(p, seed + 1, 5, 8, 64), 64), p)
    assert_independent(mask, kept(found.at(MLP), 64), p)
    assert_independent(kept(found.at(number_of("blocks.0")), 64), kept(found.at(number_of("blocks.1")), 64), p)
    assert_independent(mask[1:], mask[:-1], p)
    assert_independent(mask[:, 1:], mask[:, :-1], p)
    for apart in (1, 2, 3, 4, 8):  # four features share a number
        assert_independent(mask[..., apart:], mask[..., :-apart], p)


@given(shares, seeds)
@settings(max_examples=10)
def test_heads_and_keys_are_independent(p, seed):
    _, weights = Dropping(stream=0.0, weights=p, num_heads=4, seed=seed)(cells_of(range(4), 64), 0)
    mask = kept(weights, 64)
    assert mask.shape == (4, 4, 64, 64)
    for dim in range(4):
        length = mask.shape[dim] - 1
        assert_independent(mask.narrow(dim, 1, length), mask.narrow(dim, 0, length), p)


@given(shares, seeds, st.data())
def test_a_window_is_the_same_whoever_looks_through_it(p, seed, data):
    whole = dropout(p, seed, 0, 3, 7)
    wanted = whole.dropped(slice(None), slice(0, 23))
    top, left = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 22))
    bottom, right = data.draw(st.integers(top + 1, 7)), data.draw(st.integers(left + 1, 23))
    mine = whole.dropped(slice(top, bottom), slice(left, right))
    assert torch.equal(mine, wanted[:, top:bottom, left:right])
    some = replace(whole, states=whole.states[1:, top:bottom])
    assert torch.equal(some.dropped(slice(None), slice(left, right)), wanted[1:, top:bottom, left:right])


# ---- where


def by_hand(model: GPT, tokens: Tensor, cells: Tensor, step: int) -> Tensor:
    """Compute the features of a GPT with rotary positions and two blocks, and drop where GPT-2 does."""
    config, T = model.config, tokens.shape[1]
    states = numbered(seed_of(7, step), cells)
    stream, mask = Dropout(config.dropout, states), Mask(T, T)

    def drop(layer: str, place: int, x: Tensor) -> Tensor:
        return stream.at(number_of(layer)).at(place)(x)

    rows = model_rows(model, tokens)
    x = drop("embed", EMBEDDING, F.embedding(tokens, model.embed.tokens.weight))
    for name, block in (("blocks.0", model.blocks[0]), ("blocks.1", model.blocks[1])):
        if config.attention_dropout:
            heads = torch.stack([numbered(states, torch.tensor(head)) for head in range(config.num_heads)], dim=1)
            mask = Mask(T, T, dropout=Dropout(config.attention_dropout, heads).at(number_of(name)))
        x = x + drop(name, ATTENTION, block.attention(block.attention_norm(x), replace(rows, mask=mask)))
        x = x + drop(name, MLP, block.mlp(block.mlp_norm(x)))
    return model.norm(x)


def model_rows(model: GPT, tokens: Tensor):
    """Return what a forward without dropout tells its layers."""
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[1]))
    model.features(tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("config", [DROPPING, replace(SMALL, dropout=0.5), replace(DROPPING, dropout=0.0)])
def test_a_gpt_drops_after_the_embedding_and_what_is_added_to_the_stream(config):
    model = GPT(config, seed=7).to(torch.float64)
    tokens, cells = torch.arange(10).view(2, 5), cells_of([3, 1], 5)
    got = model.features(tokens, cells=cells, step=2)
    assert (got - by_hand(model, tokens, cells, 2)).abs().max() <= 1e-12
    assert not torch.equal(got, model.features(tokens, cells=cells, step=3))


@given(seeds, st.integers(1, 4), st.permutations(range(5)))
@settings(max_examples=20)
def test_rows_may_come_in_any_order_and_number(seed, at_once, order):
    model = GPT(DROPPING, seed=seed).to(torch.float64)
    tokens = torch.randint(0, 11, (5, 6), generator=torch.Generator().manual_seed(seed))
    whole = model(tokens, tokens, cells=cells_of(range(5), 6), step=1)
    for rows in torch.tensor(order).split(at_once):
        losses = model(tokens[rows], tokens[rows], cells=cells_of(rows.tolist(), 6), step=1)
        assert (losses - whole[rows]).abs().max() <= 1e-12


@pytest.mark.parametrize("what", ["all", "2", "attention"])
def test_what_is_recomputed_drops_the_same(what):
    gradients = []
    for chosen in ("none", what):
        model = GPT(DROPPING, seed=3)
        recompute(model, chosen)
        tokens = torch.arange(10).view(2, 5)
        model(tokens, tokens, cells=cells_of(range(2), 5), step=0).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---- attention


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], Mask]:
    """Draw q, k, v and a mask that drops, and leaves every query its own key."""
    B, G, R, T = (draw(st.integers(1, most)) for most in (2, 2, 3, 9))
    packed, seed = draw(st.booleans()), draw(seeds)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, G * R, T, 3, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, B, G, T, 3, generator=generator, dtype=torch.float64)
    documents = torch.randint(0, 3, (B, T), generator=generator).sort().values if packed else None
    _, weights = Dropping(stream=0.0, weights=draw(shares), num_heads=G * R, seed=seed)(cells_of(range(B), T), 1)
    mask = Mask(T, T, causal=draw(st.booleans()), queries=documents, keys=documents, dropout=weights)
    return [x.requires_grad_() for x in (q, k, v)], mask


@given(problems(), st.integers(1, 12))
def test_tiled_attention_drops_as_the_reference(problem, tile):
    inputs, mask = problem
    found = []
    for attention in (reference, lambda *args: tiled(*args, tile=tile)):
        out = attention(*inputs, mask)
        towards = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        found.append([out, *torch.autograd.grad((out * towards).sum(), inputs)])
    for got, wanted in zip(*found, strict=True):
        assert (got - wanted).abs().max() <= 1e-10 * max(1, wanted.abs().max().item())


@given(problems())
@settings(max_examples=20)
def test_the_reference_drops_weights_after_the_softmax(problem):
    (q, k, v), mask = problem
    q, k, v = (x.detach() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    plain = reference(
        q, k, torch.eye(q.shape[2], dtype=q.dtype).expand(*q.shape[:2], -1, -1), replace(mask, dropout=None)
    )
    lost = mask.dropout.dropped(slice(None), slice(0, q.shape[2]))
    expected = (plain.masked_fill(lost, 0) * (PARTS / (PARTS - round(mask.dropout.p * PARTS)))) @ v
    assert (reference(q, k, v, mask) - expected).abs().max() <= 1e-12 * max(1, expected.abs().max().item())


# ---- when


def losses_and_gradients(config: GPTConfig, **rows: object) -> list[Tensor]:
    model = GPT(config, seed=1)
    tokens = torch.arange(10).view(2, 5)
    losses = model(tokens, tokens, **rows)
    losses.sum().backward()
    return [losses.detach(), *(p.grad for p in model.parameters())]


def test_without_a_probability_or_a_step_nothing_changes_by_a_bit():
    plain = losses_and_gradients(replace(SMALL, attention="reference"))
    cells = cells_of(range(2), 5)
    none = losses_and_gradients(replace(SMALL, attention="reference"), cells=cells, step=0)
    for others in (none, losses_and_gradients(DROPPING), losses_and_gradients(DROPPING, cells=cells)):
        assert all(torch.equal(a, b) for a, b in zip(plain, others, strict=True))
    assert not torch.equal(plain[0], losses_and_gradients(DROPPING, cells=cells, step=0)[0])


def micro(num_rows: int = 2, *, cells: Tensor | None = None) -> MicroBatch:
    tokens, zeros = torch.arange(num_rows * 4).view(num_rows, 4) % 11, torch.zeros(num_rows, 4, dtype=torch.int64)
    return MicroBatch(tokens, tokens, torch.arange(4).expand(num_rows, 4), zeros, zeros, cells)


def engine_of(config: GPTConfig, group=None, **more) -> Engine:
    return Engine(GPT(config, seed=1).to(torch.float64), group, precision=Precision(torch.float64), lr=1e-3, **more)


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(tp=2, tokens=True)])
def test_evaluation_and_generation_drop_nothing(layout):
    def look(group, config: GPTConfig) -> tuple[list[Tensor], object]:
        engine, losses = engine_of(config, group, layout=layout), []
        engine.runner.evaluate([micro(), micro()], lambda rows, of_rows: losses.append(of_rows))
        with engine.reading() as reader:
            return losses, generate(reader, [[1, 2], [3]], stop=[0], max_new=6)

    plain, dropping = (
        run_threads(lambda group, config=config: look(group, config), layout.ranks)
        for config in (replace(SMALL, attention="reference"), DROPPING)
    )
    for (losses, answers), (others, same) in zip(plain, dropping, strict=True):
        assert answers == same and all(torch.equal(a, b) for a, b in zip(losses, others, strict=True))
    assert any(losses for losses, _ in plain)


def test_an_engine_that_goes_on_drops_what_it_would_have_dropped():
    rows = [micro(cells=cells_of([0, 1], 4)), micro(cells=cells_of([2, 3], 4))]
    straight = engine_of(DROPPING)
    first = straight.train_step(rows)
    stored, wanted = InMemory(straight.pieces()), straight.train_step(rows)
    resumed = engine_of(DROPPING)
    resumed.load(stored, step=1, num_updates=1)
    assert resumed.train_step(rows) == wanted != first


def test_a_step_that_is_run_again_to_find_its_bad_gradient_drops_the_same(monkeypatch):
    engine, steps = engine_of(DROPPING), []
    train = engine.runner.train
    monkeypatch.setattr(engine.runner, "train", lambda *args, step: (steps.append(step), train(*args, step=step))[1])
    engine.model.embed.tokens.weight.data[1] = torch.inf
    assert engine.train_step([micro(cells=cells_of([0, 1], 4))]).skipped
    assert steps == [0, 0]


# ---- which rows a rank has


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), seeds)
def test_cells_say_where_in_the_step_a_token_stands(rows, length, size, ranks, seed):
    rng = np.random.default_rng(seed)
    rows = rows * ranks
    columns = [rng.integers(0, 99, (rows, length)) for _ in range(5)]
    columns[1][rng.random(rows) < 0.5] = -100  # micro-batches without a label may be left out
    batch, seen = Batch(*columns), []
    for rank in range(ranks):
        group = SoloGroup()
        group.rank, group.size = rank, ranks
        for one in micro_batches(batch, size, group):
            assert np.array_equal(batch.inputs.flatten()[one.cells.numpy()], one.tokens.numpy())
            seen += one.cells.flatten().tolist()
    assert len(seen) == len(set(seen)) and set(seen) <= set(range(rows * length))


def test_rows_that_do_not_know_their_cells_are_an_error():
    with pytest.raises(UserError, match="micro-batch 1 has no cells"):
        engine_of(DROPPING).train_step([micro(cells=cells_of([0, 1], 4)), micro()])
    with pytest.raises(UserError, match="no cells are given"):
        GPT(DROPPING).features(micro().tokens, step=0)
    engine_of(SMALL).train_step([micro()])  # and without dropout nobody asks


# ---- what is refused


def test_attention_dropout_is_refused_where_it_cannot_be():
    with pytest.raises(UserError, match="the fused attention cannot drop weights") as refused:
        replace(SMALL, attention_dropout=0.1)
    assert "reference" in refused.value.fix and "tiled" in refused.value.fix
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(UserError, match="the fused attention cannot drop weights"):
        fused(x, x, x, Mask(2, 2, dropout=Dropout(0.1, torch.zeros(1, 1, 2, dtype=torch.int64))))
    with pytest.raises(UserError, match="attention_dropout 0.4 with sp=1"):
        cut_sequence(GPT(DROPPING), "ring", SoloGroup())


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
def test_a_share_outside_its_range_is_named(name, p):
    with pytest.raises(UserError, match=f"{name} is a share from 0 to below 1"):
        replace(SMALL, attention="tiled", **{name: p})


def test_torchs_dropout_is_refused_with_ours_as_the_way_out():
    def refuse(group) -> str:
        with pytest.raises(UserError) as refused:
            tensor_parallel(nn.Sequential(nn.Dropout(0.1)), {}, group)
        return refused.value.fix

    assert all("GPTConfig.dropout" in fix for fix in run_threads(refuse, 2))


# ---- the command line


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": turns(number)}) + "\n" for number in range(40)))
    return path


def turns(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"say {number % 7}"}, {"role": "assistant", "content": f"{number % 7}!"}]


def sft(chats: Path, out: Path, model: str, *words: str) -> tuple[float, float]:
    """Train two steps; return the first evaluation's loss and the last step's."""
    where = ["--data", str(chats), "--out", str(out), "--cache", str(chats.parent / "cache"), "--model", model]
    small = "--steps 2 --seq 32 --batch 4 --dtype fp32 --threads 1 --score 0".split()
    small += ["--vocab-size", "300"] if model == "nano" else []
    assert main(["sft", *where, *small, *words]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines[0]["eval_loss"], next(line["loss"] for line in lines if line["step"] == 2 and "loss" in line)


def test_a_run_drops_keeps_it_in_its_configuration_and_hands_it_on(chats, tmp_path, capsys):
    untrained, loss = sft(chats, tmp_path / "plain", "nano")
    dropping = sft(chats, tmp_path / "dropping", "nano", "--dropout", "0.5")
    assert dropping[0] == untrained and abs(dropping[1] - loss) > 1e-3
    small = sft(chats, tmp_path / "micro", "nano", "--dropout", "0.5", "--micro-batch", "1")
    assert small[1] == pytest.approx(dropping[1], abs=1e-5)
    assert ChatModel.load(tmp_path / "dropping").model.config.dropout == 0.5
    capsys.readouterr()
    sft(chats, tmp_path / "on", str(tmp_path / "dropping"))
    assert "--dropout 0.5: the model's own" in capsys.readouterr().out
    assert ChatModel.read_config(tmp_path / "on").dropout == 0.5
    sft(chats, tmp_path / "off", str(tmp_path / "on"), "--dropout", "0")
    assert ChatModel.read_config(tmp_path / "off").dropout == 0
