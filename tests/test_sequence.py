"""Laws of sequence parallelism: rows cut over ranks are attended to, and learnt from, as if they were whole."""

import gc
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from minispeed.collective.group import Group, SoloGroup
from minispeed.collective.launch import launch
from minispeed.collective.trace import Trace, Traced
from minispeed.collective.world import World
from minispeed.errors import UserError
from minispeed.mesh import Mesh
from minispeed.model.attention import IMPLEMENTATIONS, implementation, reference
from minispeed.model.config import GPTConfig
from minispeed.model.generate import Sampling, generate
from minispeed.model.gpt import GPT
from minispeed.model.loss import IGNORED
from minispeed.model.mask import Mask
from minispeed.model.presets import preset
from minispeed.model.recompute import recompute
from minispeed.placement import join
from minispeed.sequence import ring as ring_room
from minispeed.sequence.cut import KINDS, SequenceCut, cut_sequence
from minispeed.sequence.masks import PerMask
from minispeed.sequence.ring import ring, zigzag
from minispeed.sequence.ulysses import ulysses, whole_masks
from minispeed.tensor.parallel import tensor_parallel
from minispeed.tensor.plan import gpt_plan
from minispeed.testing.models import small_configs
from minispeed.testing.pool import shared_pool
from minispeed.testing.strategies import seeds

kinds = st.sampled_from(sorted(KINDS))


def on_threads(fn: Callable[[Group], Any], ranks: int) -> list[Any]:
    return launch(lambda world: fn(world.group), ranks=ranks, backend="threads")


def assert_close(got: Tensor, expected: Tensor, name: str) -> None:
    assert got.shape == expected.shape
    difference = (got - expected).abs().max().item()
    assert difference <= 1e-10 * max(1.0, expected.abs().max().item()), f"{name} differs by {difference:.2e}"


def tokens_of(kind: str, rank: int, size: int, num_tokens: int) -> Tensor:
    """Return which tokens of a row a rank holds, from the kind's order alone."""
    mine = KINDS[kind].chunks(rank, size)
    length = num_tokens // (size * len(mine))
    return torch.cat([torch.arange(chunk * length, (chunk + 1) * length) for chunk in mine])


def joined(kind: str, parts: list[Tensor], dim: int) -> Tensor:
    """Return whole rows from what the ranks hold."""
    whole = sum(part.shape[dim] for part in parts)
    order = torch.cat([tokens_of(kind, rank, len(parts), whole) for rank in range(len(parts))])
    return torch.cat(parts, dim=dim).index_select(dim, order.argsort())


# ---- attention alone


@dataclass(frozen=True)
class Problem:
    """Rows of B x T tokens to attend to, and how they are cut."""

    kind: str
    ranks: int
    batch: int
    heads: int
    kv_heads: int
    num_tokens: int
    head_dim: int
    causal: bool
    packing: str
    core: str
    tile: int
    seed: int
    layout: torch.memory_format = torch.contiguous_format

    def inputs(self) -> list[Tensor]:
        """Return q, k, v and the gradient of the output."""
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [self.normal(self.batch, n, self.num_tokens, self.head_dim, stream=i) for i, n in enumerate(heads)]

    def normal(self, *shape: int, stream: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + stream), dtype=torch.float64)

    def documents(self) -> Tensor | None:
        """Return none; packed rows that end in padding; or documents whose tokens do not lie together."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(0, 4, (self.batch, self.num_tokens), generator=generator)
        drawn[drawn == 3] = -1
        packed = (drawn + 1).sort(descending=True).values - 1
        return {"none": None, "packed": packed, "scattered": drawn}[self.packing]

    def attention(self, group: Group) -> Any:
        return ring(group, tile=self.tile) if self.kind == "ring" else ulysses(IMPLEMENTATIONS[self.core], group)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    ranks, kind = draw(st.integers(1, 4)), draw(kinds)
    kv_heads = draw(st.integers(1, 2)) * (ranks if kind == "ulysses" else 1)
    return Problem(
        kind=kind,
        ranks=ranks,
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        num_tokens=ranks * (2 if kind == "ring" else 1) * draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 4)),
        causal=draw(st.booleans()),
        packing=draw(st.sampled_from(["none", "packed", "scattered"])),
        core=draw(st.sampled_from(sorted(IMPLEMENTATIONS))),
        tile=draw(st.integers(1, 5)),
        seed=draw(seeds),
        layout=draw(st.sampled_from([torch.contiguous_format, torch.channels_last])),
    )


def attended(problem: Problem, group: Group, core: Any = None) -> list[Tensor]:
    """Return what a rank has of the output and of the gradients of q, k, v."""
    mine = tokens_of(problem.kind, group.rank, group.size, problem.num_tokens)
    *inputs, pull = (x[:, :, mine].contiguous(memory_format=problem.layout) for x in problem.inputs())
    documents = problem.documents()
    documents = None if documents is None else documents[:, mine]
    mask = Mask(len(mine), len(mine), causal=problem.causal, queries=documents, keys=documents)
    out = (core or problem.attention(group))(*(x.requires_grad_() for x in inputs), mask)
    return [out.detach(), *torch.autograd.grad((out * pull).sum(), inputs)]


def check_attention(problem: Problem, by_rank: list[list[Tensor]]) -> None:
    expected = attended(replace(problem, kind="ulysses"), SoloGroup(), core=reference)  # all tokens, in order
    for name, wanted, *parts in zip(("output", "q", "k", "v"), expected, *by_rank, strict=True):
        assert_close(joined(problem.kind, parts, dim=2), wanted, name)


@given(problems())
def test_rows_cut_over_ranks_are_attended_to_as_whole_ones(problem):
    check_attention(problem, on_threads(partial(attended, problem), problem.ranks))


def attended_in(world: World, problem: Problem) -> list[Tensor]:
    return attended(problem, world.group)


@given(problems())
@settings(max_examples=8)
def test_processes_over_gloo_too(problem):
    check_attention(problem, shared_pool().run(attended_in, problem, ranks=problem.ranks))


class OnTwoRanks(torch.autograd.Function):
    """A ring's output, weighted, as a function of whole q, k, v: value and gradients come from two ranks."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, *inputs: Tensor) -> Tensor:
        given = replace_inputs(problem, [*(x.detach() for x in inputs), problem.inputs()[3]])
        out, *gradients = (joined("ring", list(p), 2) for p in zip(*on_threads(partial(attended, given), 2)))
        ctx.save_for_backward(*gradients)
        return (out * problem.inputs()[3]).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *(grad * x for x in ctx.saved_tensors)


@dataclass(frozen=True)
class GivenProblem(Problem):
    """A problem whose tensors are given."""

    tensors: tuple[Tensor, ...] = ()

    def inputs(self) -> list[Tensor]:
        return list(self.tensors)


def replace_inputs(problem: Problem, tensors: list[Tensor]) -> GivenProblem:
    return GivenProblem(**vars(problem), tensors=tuple(tensors))


@pytest.mark.parametrize("packing", ["none", "packed"])
def test_the_ring_passes_gradcheck(packing):
    problem = Problem("ring", 2, 1, 2, 1, 8, 2, True, packing, "reference", tile=2, seed=7)
    inputs = [x.requires_grad_() for x in problem.inputs()[:3]]
    assert torch.autograd.gradcheck(lambda *qkv: OnTwoRanks.apply(problem, *qkv), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_half_precision_stays_near(kind, dtype):
    problem = Problem(kind, 2, 1, 4, 2, 32, 8, True, "packed", "tiled", tile=4, seed=3)
    given = replace_inputs(problem, [x.to(dtype) for x in problem.inputs()])
    exact = attended(replace_inputs(replace(problem, kind="ulysses"), problem.inputs()), SoloGroup(), core=reference)
    for wanted, *parts in zip(exact, *on_threads(partial(attended, given), 2), strict=True):
        assert all(part.dtype == dtype for part in parts)
        error = (joined(kind, parts, dim=2) - wanted).abs().max()
        assert error < 20 * torch.finfo(dtype).eps * max(1, wanted.abs().max())


# ---- what a rank computes, holds, sends


def events(problem: Problem, *, backward: bool) -> list[Trace]:
    """Return what each rank said in one attention's forward, or in its backward."""

    def run(group: Group) -> Trace:
        trace = Trace()
        traced = Traced(group, trace)
        mine = tokens_of(problem.kind, group.rank, group.size, problem.num_tokens)
        *inputs, pull = (x[:, :, mine].requires_grad_() for x in problem.inputs())
        documents = problem.documents()
        documents = None if documents is None else documents[:, mine]
        mask = Mask(len(mine), len(mine), queries=documents, keys=documents)
        out = problem.attention(traced)(*inputs, mask)
        if backward:
            trace.clear()
            out.backward(pull)
        return trace

    return on_threads(run, problem.ranks)


@given(problems(), st.booleans())
@settings(max_examples=30)
def test_messages_are_what_the_papers_say(problem, backward):
    """Features cost what the closed form says; documents, integers, are gathered apart, once and forward alone."""
    P, whole = problem.ranks, problem.batch * problem.num_tokens
    h, h_kv = problem.heads * problem.head_dim, problem.kv_heads * problem.head_dim
    ulysses_says = whole * (2 * h + 2 * h_kv) * (P - 1) // P**2
    ring_says = (4 if backward else 2) * whole * h_kv * (P - 1) // P
    features = {"ulysses": ("all_to_all", ulysses_says), "ring": ("send", ring_says)}
    integers = whole // P * (P - 1) if problem.packing != "none" and not backward else 0
    for trace in events(problem, backward=backward):
        kind, elements = features[problem.kind]
        assert trace.sent(kind) == 8 * elements
        assert trace.sent("all_gather") == 8 * integers
        assert trace.sent() == 8 * (elements + integers)


@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), seeds)
@settings(max_examples=15)
def test_zigzag_gives_every_rank_the_same_work_and_none_that_order_excludes(ranks, length, backward, seed):
    """Each rank computes 2 P + 1 blocks, two of them on the diagonal: in all the lower triangle of 2 P x 2 P."""
    problem = Problem("ring", ranks, 1, 2, 1, 2 * ranks * length, 2, True, "none", "reference", tile=9, seed=seed)
    computed: list[tuple[str, int, int]] = []
    original = ring_room.Gradients.add if backward else ring_room.tile_scores
    place = 5 if backward else 2  # of the block among the arguments

    def counted(*args: Any) -> Any:
        block = args[place]
        computed.append((threading.current_thread().name, block.mask.offset // length, block.mask.num_queries))
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        if backward:
            patch.setattr(ring_room.Gradients, "add", counted)
        else:
            patch.setattr(ring_room, "tile_scores", counted)
        on_threads(partial(attended, problem), ranks)
    by_rank = Counter(rank for rank, _, _ in computed)
    assert set(by_rank.values()) == {2 * ranks + 1} and len(by_rank) == ranks
    assert Counter(rank for rank, distance, _ in computed if distance == 0) == dict.fromkeys(by_rank, 2)
    assert all(distance >= 0 and rows == length for _, distance, rows in computed)
    assert len(computed) == ranks * (2 * ranks + 1)


@given(st.integers(1, 9))
def test_every_chunk_of_a_row_is_on_one_rank(size):
    for kind in KINDS.values():
        held = [chunk for rank in range(size) for chunk in kind.chunks(rank, size)]
        assert sorted(held) == list(range(len(held)))
    assert [zigzag(rank, 4) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]


def test_the_ring_keeps_its_inputs_its_output_and_one_number_a_query():
    problem = Problem("ring", 2, 2, 4, 2, 16, 3, True, "packed", "reference", tile=3, seed=1)

    def run(group: Group) -> list[tuple[int, ...]]:
        kept: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
            mask = Mask(8, 8)
            ring(group)(*(x[:, :, :8].requires_grad_() for x in problem.inputs()[:3]), mask)
        return kept

    query, key = (2, 4, 8, 3), (2, 2, 8, 3)
    assert on_threads(run, 2) == [[query, key, key, query, (2, 2, 2, 8)]] * 2


def test_documents_are_gathered_once_for_all_layers_and_forgotten_with_the_mask():
    documents = torch.tensor([[0, 0, 1, 1]])

    def run(group: Group) -> None:
        trace = Trace()
        masks: PerMask[Mask] = whole_masks(Traced(group, trace))
        q = torch.ones(1, 2, 4, 1)
        mask = Mask(4, 4, queries=documents, keys=documents)
        for layer in (ulysses(IMPLEMENTATIONS[name], group, whole_mask=masks) for name in IMPLEMENTATIONS):
            layer(q, q, q, mask)
        assert trace.count("all_gather") == 1 and masks(mask) is masks(mask) and len(masks.made) == 1
        assert masks(mask).queries.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]
        del mask
        gc.collect()
        assert not masks.made

    on_threads(run, 2)


# ---- the whole model


@dataclass(frozen=True)
class Case:
    """One cut of one drawn model; tp ranks of each sp share a model."""

    config: GPTConfig
    kind: str
    sp: int
    tp: int
    num_tokens: int
    packed: bool
    recompute: str
    seed: int


@st.composite
def cases(draw: st.DrawFn, sp: Any = st.integers(1, 4), tp: int = 1) -> Case:
    """Draw a model whose heads the ranks divide, and rows of any length."""
    size, kind, config = draw(sp), draw(kinds), draw(small_configs())
    fields = {"num_heads": tp * size, "num_kv_heads": tp * size, "hidden_dim": tp}
    return Case(
        config=replace(config, **{name: times * getattr(config, name) for name, times in fields.items()}),
        kind=kind,
        sp=size,
        tp=tp,
        num_tokens=draw(st.integers(1, 13)),
        packed=draw(st.booleans()),
        recompute=draw(st.sampled_from(["none", "all", "attention"])),
        seed=draw(seeds),
    )


def batch(case: Case) -> dict[str, tuple[Tensor, int]]:
    """Return tokens, labels, positions and, of packed rows, documents, each with what fills it up."""
    generator = torch.Generator().manual_seed(case.seed)
    tokens, labels = torch.randint(0, case.config.vocab_size, (2, 2, case.num_tokens), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED
    positions = torch.arange(case.num_tokens).expand(2, -1)
    rows = {"tokens": (tokens, 0), "labels": (labels, IGNORED), "positions": (positions, 0)}
    if not case.packed:
        return rows
    documents = torch.stack([positions[0] // 3, torch.where(positions[0] < 4, 0, -1)])
    return rows | {"positions": (positions % 3, 0), "documents": (documents, -1)}


Result = tuple[Tensor, dict[str, Tensor]]


def learnt(model: GPT, rows: dict[str, Tensor]) -> Result:
    """Return the sum of losses, and every parameter's gradient."""
    loss = model(**rows).sum()
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}


def build(case: Case) -> GPT:
    model = GPT(case.config, seed=case.seed).to(torch.float64)
    recompute(model, case.recompute)
    return model


def learnt_on(case: Case, group: Group) -> Result:
    """Return a rank's part: the loss of its tokens, and what they say of each parameter."""
    model = build(case)
    cut = cut_sequence(model, case.kind, group)
    return learnt(model, {name: cut.share(x, fill=fill) for name, (x, fill) in batch(case).items()})


def learnt_in(world: World, case: Case) -> Result:
    return learnt_on(case, world.group)


def check_model(case: Case, results: list[Result]) -> None:
    loss, gradients = learnt(build(case), {name: x for name, (x, _) in batch(case).items()})
    assert_close(torch.stack([one for one, _ in results]).sum(0), loss, "loss")
    for name, wanted in gradients.items():
        assert_close(torch.stack([held[name] for _, held in results]).sum(0), wanted, name)


@given(cases())
@settings(print_blob=True)
def test_a_model_whose_rows_are_cut_learns_the_same(case):
    check_model(case, on_threads(partial(learnt_on, case), case.sp))


@given(cases())
@settings(max_examples=5, print_blob=True)
def test_a_model_over_gloo_too(case):
    check_model(case, shared_pool().run(learnt_in, case, ranks=case.sp))


@given(cases(sp=st.just(2), tp=2), st.booleans())
@settings(max_examples=12, print_blob=True)
def test_rows_and_heads_can_both_be_cut(case, cut_stream):
    case = replace(case, num_tokens=8) if cut_stream else case  # T/sp tokens, which tp divides
    mesh = Mesh(world=4, pp=1, dp=1, sp=2, tp=2)

    def run(group: Group) -> tuple[Result, Any, int]:
        model = build(case)
        tp_group, sp_group = (group.subgroup(mesh.lines(axis)) for axis in ("tp", "sp"))
        placement = tensor_parallel(model, gpt_plan(case.config), tp_group, sequence_parallel=cut_stream)
        cut = cut_sequence(model, case.kind, sp_group)
        result = learnt(model, {name: cut.share(x, fill=fill) for name, (x, fill) in batch(case).items()})
        return result, placement, tp_group.rank

    results = on_threads(run, 4)
    by_tp = [[result for result, _, rank in results if rank == mine] for mine in range(2)]
    summed = [
        (torch.stack([loss for loss, _ in half]).sum(0), {n: sum(g[n] for _, g in half) for n in half[0][1]})
        for half in by_tp
    ]
    whole = {name: join([held[name] for _, held in summed], results[0][1][name]) for name in summed[0][1]}
    check_model(case, [(summed[0][0], whole)])
    assert torch.equal(summed[0][0], summed[1][0])


@given(kinds, st.sampled_from(["none", "all"]), st.booleans())
@settings(max_examples=8)
def test_layers_send_the_closed_form_each_and_again_where_they_are_recomputed(kind, what, packed):
    config = preset("nano", num_layers=3, model_dim=8, num_heads=4, num_kv_heads=2, head_dim=2)
    case = Case(config, kind, 2, 1, 12, packed, what, seed=0)

    def run(group: Group) -> Trace:
        trace = Trace()
        learnt_on(case, Traced(group, trace))
        return trace

    forward = {"ulysses": 2 * 12 * (2 * 8 + 2 * 4) // 4, "ring": 2 * 2 * 12 * 4 // 2}[kind]
    backward = {"ulysses": forward, "ring": 2 * forward}[kind]
    for trace in on_threads(run, 2):
        assert trace.sent("all_gather") == packed * 8 * 2 * 6
        sent = trace.sent() - trace.sent("all_gather")
        assert sent == 3 * 8 * (forward * (2 if what == "all" else 1) + backward)


@given(cases(), st.lists(st.integers(1, 4), min_size=1, max_size=3))
@settings(max_examples=10)
def test_whole_rows_are_written_and_evaluated_as_alone(case, lengths):
    generator = torch.Generator().manual_seed(case.seed)
    prompts = [torch.randint(0, case.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]

    def write(model: GPT) -> Any:
        return generate(model, prompts, stop=[0], max_new=4, sampling=Sampling(temperature=0.0))

    def run(group: Group) -> Any:
        model = build(case)
        cut = cut_sequence(model, case.kind, group)
        tokens, labels = (batch(case)[name][0] for name in ("tokens", "labels"))
        with cut.whole_rows():
            assert cut.share(tokens, fill=0) is tokens
            assert torch.equal(model(tokens, labels), build(case)(tokens, labels))
            written = write(model)
        result = learnt(model, {name: cut.share(x, fill=fill) for name, (x, fill) in batch(case).items()})
        return written, result

    expected = write(build(case))
    results = on_threads(run, case.sp)
    assert [written for written, _ in results] == [expected] * case.sp
    check_model(case, [result for _, result in results])


# ---- shares


@given(kinds, st.integers(1, 5), st.integers(1, 23), st.integers(0, 2))
def test_shares_are_the_rows_filled_up(kind, ranks, num_tokens, extra_dims):
    x = torch.arange(2 * num_tokens * 3**extra_dims).view(2, num_tokens, *[3] * extra_dims)

    def run(group: Group) -> Tensor:
        return cut_sequence(GPT(roomy(ranks)), kind, group).share(x, fill=-7)

    whole = joined(kind, on_threads(run, ranks), dim=1)
    multiple = ranks * (2 if kind == "ring" else 1)
    assert whole.shape[1] == -(-num_tokens // multiple) * multiple
    assert torch.equal(whole[:, :num_tokens], x) and (whole[:, num_tokens:] == -7).all()


def roomy(ranks: int) -> GPTConfig:
    return preset("nano", num_layers=1, model_dim=4, num_heads=ranks, num_kv_heads=ranks, head_dim=2, hidden_dim=2)


# ---- mistakes


def test_heads_that_do_not_divide_name_the_sizes_that_do():
    config = preset("nano", num_layers=2, model_dim=8, num_heads=12, num_kv_heads=6, head_dim=2)
    model = GPT(config)
    cores = [block.attention.core for block in model.blocks]
    says = r"12 heads with 6 key/value heads, which sp=4 does not divide; try: sp=1 or 2 or 3 or 6, or ring attention"

    def run(group: Group) -> None:
        with pytest.raises(UserError, match=says):
            cut_sequence(model, "ulysses", group)
        assert [block.attention.core for block in model.blocks] == cores
        with pytest.raises(UserError, match="3 heads with 3 key/value heads, which sp=4 does not divide"):
            ulysses(reference, group)(*[torch.ones(1, 3, 1, 1)] * 3, Mask(1, 1))

    on_threads(run, 4)


def test_a_model_that_cannot_be_cut_is_a_sentence():
    model, group = GPT(roomy(1)), SoloGroup()
    with pytest.raises(UserError, match="rows are cut by ulysses or ring, not 'rings'; try: ring"):
        cut_sequence(model, "rings", group)
    with pytest.raises(UserError, match="no attention in this Linear"):
        cut_sequence(torch.nn.Linear(1, 1), "ring", group)
    cut_sequence(model, "ring", group)
    with pytest.raises(UserError, match="the rows of blocks.0.attention are cut already"):
        cut_sequence(model, "ulysses", group)
    with pytest.raises(UserError, match="a tile holds at least 1 token, got 0"):
        ring(group, tile=0)


def test_rows_that_are_not_shares_are_named():
    model, tokens = GPT(roomy(1)), torch.zeros(1, 3, dtype=torch.int64)
    cut = cut_sequence(model, "ring", SoloGroup())
    with pytest.raises(UserError, match="no positions are given; try: positions=cut.share"):
        model(tokens, tokens)
    with pytest.raises(UserError, match="two chunks of one length, and 3 tokens are not; try: rows of a multiple of 2"):
        model(tokens, tokens, positions=tokens)
    with pytest.raises(UserError, match="5 keys for 3 queries: a cache of keys belongs to whole rows"):
        ulysses(reference, SoloGroup())(*[torch.ones(1, 1, 3, 1)] * 3, Mask(3, 5, offset=2))
    with cut.whole_rows():
        model(tokens, tokens)


def test_a_core_that_was_replaced_is_found_and_a_recomputed_one_is_not():
    tokens = torch.zeros(1, 4, dtype=torch.int64)

    def cut_and(change: Callable[[GPT], None]) -> SequenceCut:
        model = GPT(roomy(1))
        cut = cut_sequence(model, "ring", SoloGroup())
        change(model)
        return cut

    def replace_core(model: GPT) -> None:
        model.blocks[0].attention.core = implementation("fused")

    cut_and(partial(recompute, what="attention")).share(tokens, fill=0)
    with pytest.raises(UserError, match="blocks.0.attention.core was replaced after its rows had been cut"):
        cut_and(replace_core).share(tokens, fill=0)
