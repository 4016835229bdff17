"""What every rank of a drawn job sends in a step is the closed form: so many calls of each kind, and so many bytes.

Every call of a step after the first is counted, the few numbers too: by kind, and by line of ranks, on each rank alone.
An all-reduce cuts its buffer in parts that need not be equal; there the bytes of a line's ranks are taken together.
Lines that have the same ranks, because an axis between them is of one, cannot be told apart.
"""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import isclose

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from minispeed.axes import Layout
from minispeed.collective.threads import run_threads
from minispeed.collective.trace import Trace, Traced
from minispeed.engine import Engine, MicroBatch
from minispeed.errors import UserError
from minispeed.ledger.job import Job
from minispeed.ledger.messages import lines, messages
from minispeed.ledger.states import sent
from minispeed.ledger.units import bounds, units
from minispeed.model.config import GPTConfig
from minispeed.model.dropout import cells_of
from minispeed.model.gpt import GPT
from minispeed.model.lora import LoRA, add_lora
from minispeed.model.loss import IGNORED
from minispeed.model.recompute import recompute
from minispeed.optim import SGD
from minispeed.precision import Precision

TOKENS = 48  # two chunks for each of 1 to 4 ranks, of an even number of tokens each
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
TARGETS = [("attention.qkv",), ("attention.out", "mlp.up"), ("mlp.*",), ("mlp.down",), ("blocks.1.*.*", "*.0.mlp.down")]


@st.composite
def layouts(draw, most):
    """Draw axes whose product is at most `most`, in any order of size, how each cuts, and dp."""
    left, sizes = most, {}
    for axis in draw(st.permutations(["pp", "dp", "sp", "tp"])):
        sizes[axis] = draw(st.sampled_from([size for size in (2, 1, 3, 2, 4, 1) if size <= left]))
        left //= sizes[axis]
    dp = sizes.pop("dp")
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zb_h1"]))
    virtual = draw(st.integers(1, 2)) if schedule in ("gpipe", "interleaved") and sizes["pp"] > 1 else 1
    sequence = draw(st.sampled_from(["ulysses", "ring"]))
    tokens = sizes["tp"] > 1 and draw(st.booleans())
    return Layout(**sizes, schedule=schedule, virtual=virtual, sequence=sequence, tokens=tokens), dp


@st.composite
def configs(draw, layout):
    """Draw a GPT of a few hundred parameters that the layout can cut; its vocabulary need not divide."""
    kv = layout.tp * (layout.sp if layout.sequence == "ulysses" else 1) * draw(st.integers(1, 2))
    plain = GPTConfig(
        vocab_size=draw(st.integers(2, 23)),
        max_positions=TOKENS,
        num_layers=draw(st.integers(max(2, layout.stages - 2), layout.stages + 2)),
        model_dim=draw(st.sampled_from([3, 8])),
        num_heads=kv * draw(st.integers(1, 2)),
        num_kv_heads=kv,
        head_dim=2,
        hidden_dim=layout.tp * draw(st.integers(1, 3)),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        positions=draw(st.sampled_from(["rotary", "learned"])),
        mlp=draw(st.sampled_from(["swiglu", "gelu"])),
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.1])),
    )
    deep = draw(st.sampled_from([{}, {"deep": "x0"}, {"deep": "unet"}, {"deep": "dwa"}]))
    try:
        return replace(plain, **deep, deep_tasks=draw(st.integers(1, 2)) if deep else 1)
    except UserError:  # too few layers for the mask
        return plain


@st.composite
def jobs(draw):
    layout, dp = draw(layouts(draw(st.sampled_from([4, 8]))))
    config, lora = draw(configs(layout)), draw(st.sampled_from([0, 0, 2]))
    targets = draw(st.sampled_from(TARGETS)) if lora else ()
    cuts = bounds(config, layout.stages, lora, targets)
    if any(begin == end - 1 and begin in (0, config.num_layers + 1) for begin, end in pairwise(cuts)):
        layout = replace(layout, schedule={"zb_h1": "1f1b"}.get(layout.schedule, layout.schedule))  # nothing to split
    size = draw(st.integers(1, 2))
    micros = draw(st.integers(1, 3)) * (layout.pp if layout.schedule == "interleaved" else 1)
    short = draw(st.integers(0, size - 1)) if layout.pp == 1 else 0
    is_padded = layout.tp == 1 and draw(st.booleans())
    is_asked_for = not lora and config.deep == "none"  # where a backward does not read a unit, too much is asked for
    return Job(
        model=config,
        devices=dp * layout.ranks,
        rows=dp * (micros * size - short),
        tokens=TOKENS - 3 * is_padded,
        micro_batch=size,
        layout=layout,
        zero=draw(st.integers(0, 3)),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        accumulate=draw(st.sampled_from([None, "bf16"])),
        supervised=draw(st.sampled_from([0.0, 0.5, 1.0])),
        recompute=draw(st.sampled_from(["none", "all", "2", "attention"])),
        prefetch=draw(st.sampled_from([0, 300, 10**6])) if is_asked_for else 0,
        persistence=draw(st.sampled_from([0, 0, 30, 200])),
        lora_rank=lora,
        lora_targets=targets,
    )


class Named(Traced):
    """A traced group whose subgroups go by their members."""

    def __init__(self, group, trace):
        super().__init__(group, trace, name=str(group.members))
        self.whole = group

    def subgroup(self, lines):
        mine = self.whole.subgroup(lines)
        return Traced(mine, self.trace, name=str(mine.members))


def rows_of(job):
    """Return the micro-batches of a replica; the share of tokens to learn from is the same on each rank of sp."""
    T = job.tokens
    tokens = torch.arange(T).expand(job.replica_rows, T) % job.model.vocab_size
    every = {0.0: 0, 0.5: 2, 1.0: 1}[job.supervised]
    labels = torch.where(torch.arange(T) % every == 0 if every else torch.zeros(T, dtype=torch.bool), tokens, IGNORED)
    zeros = torch.zeros_like(tokens)
    batch = MicroBatch(tokens, labels, torch.arange(T).expand_as(tokens), zeros, zeros, cells_of(range(len(tokens)), T))
    parts = [field.split(job.micro_batch) for field in batch]
    return [MicroBatch(*(part[micro].contiguous() for part in parts)) for micro in range(job.micros)]


def trained(job, group):
    """Return the trace of a rank's second step."""
    trace, model = Trace(), GPT(job.model)
    if job.lora_rank:
        add_lora(model, LoRA(rank=job.lora_rank, targets=job.lora_targets), seed=0)
    recompute(model, job.recompute)
    gradient = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[job.widths.gradient]
    engine = Engine(
        model,
        Named(group, trace),
        layout=job.layout,
        precision=Precision(DTYPES[job.dtype], accumulate=gradient),
        zero=job.zero,
        optimizer=lambda groups: SGD(groups, lr=0.0),
        prefetch=job.prefetch,
        persistence=job.persistence,
    )
    engine.train_step(rows_of(job))
    trace.clear()
    engine.train_step(rows_of(job))
    return trace


def counted(trace):
    """Return the calls and the bytes of each line and kind; what a rank says to itself is no message."""
    found = Counter()
    for event in trace.events:
        if event.group != str((event.rank,)) and event.kind != "recv":
            found[event.group, event.kind, "calls"] += 1
            found[event.group, event.kind, "bytes"] += event.sent
    return found


def said(job, rank):
    """Return the same by the closed form, lines that have the same members taken together."""
    mesh, found = job.mesh, Counter()
    merged = {"shards": ("dp", "sp"), "copy": ("pp", "sp", "tp"), "model": ("pp", "tp")}
    axes = {axis: (axis,) for axis in mesh.sizes} | merged | {"world": tuple(mesh.sizes)}
    for one in messages(job, mesh.coords(rank)["pp"]):
        (members,) = (line for line in mesh.lines(*axes[one.axis]) if rank in line)
        assert len(members) == lines(job)[one.axis]
        found[str(members), one.kind, "calls"] += one.count
        found[str(members), one.kind, "bytes"] += one.bytes
    return found


def check(job):
    """Each rank by itself; of all-reduces, whose parts need not be equal, the bytes of a line's ranks together."""
    traces = run_threads(lambda group: trained(job, group), job.devices)
    together, expected = Counter(), Counter()
    for rank, trace in enumerate(traces):
        found, wanted = counted(trace), said(job, rank)
        for key in found.keys() | wanted.keys():
            line, kind, unit = key
            if (kind, unit) == ("all_reduce", "bytes"):
                together[line] += found[key]
                expected[line] += wanted[key]
            else:
                assert found[key] == wanted[key], (rank, key, found[key], wanted[key])
    assert together.keys() == expected.keys()
    for line, total in together.items():
        assert total == round(expected[line], 6), (line, total, expected[line])


@given(jobs())
@settings(
    max_examples=settings.default.max_examples // 4, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
def test_each_rank_says_what_the_closed_form_says(job):
    check(job)


SMALL = GPTConfig(
    vocab_size=7,
    max_positions=TOKENS,
    num_layers=4,
    model_dim=4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=2,
    hidden_dim=4,
    tied=False,
)
SPLIT = replace(SMALL, deep="unet")  # the weights of which some stages do not read
RARE = {  # what few draws meet: a layout, a model, and what else the job has
    "dropped again": (Layout(tp=2), replace(SMALL, dropout=0.1), {"recompute": "all"}),
    "cut and dropped again": (Layout(tp=2, tokens=True), replace(SMALL, dropout=0.1), {"recompute": "2"}),
    "a ring again": (Layout(sp=2, sequence="ring"), SMALL, {"recompute": "all"}),
    "frozen before": (Layout(), SMALL, {"zero": 3, "lora_rank": 1, "lora_targets": ("blocks.2.mlp.down",)}),
    "frozen, run again": (Layout(), SMALL, {"zero": 3, "lora_rank": 1, "lora_targets": ("down",), "recompute": "all"}),
    "frozen, cut": (Layout(tp=2, tokens=True), SMALL, {"lora_rank": 1, "lora_targets": ("blocks.1.attention.out",)}),
    "weights unread": (Layout(pp=2, virtual=3, schedule="interleaved"), SPLIT, {"zero": 3}),
    "weights of tokens": (Layout(pp=2, virtual=3, schedule="gpipe", tp=2, tokens=True), SPLIT, {}),
    "small ones whole": (Layout(), replace(SMALL, tied=True), {"zero": 3, "persistence": 20}),
    "asked for, and read twice": (Layout(), replace(SMALL, tied=True), {"zero": 3, "prefetch": 10**6}),
}


@pytest.mark.parametrize("name", RARE)
def test_rare_ones_too(name):
    layout, model, others = RARE[name]
    devices = layout.ranks * (2 if layout.ranks == 1 else 1)
    check(
        Job(model=model, devices=devices, rows=4, tokens=TOKENS, micro_batch=1, layout=layout, dtype="fp32", **others)
    )


@given(jobs())
def test_zero_says_what_its_own_closed_form_does(job):
    """Where all is read once in each forward and backward: the average rank's elements, of one width."""
    is_once = not job.lora_rank and job.model.deep == "none" and not (job.layout.pp == 1 and job.model.tied)
    job = replace(job, dtype="fp32", persistence=0)
    for pp_rank in range(job.layout.pp if is_once else 0):
        sizes = [unit.elements for unit in units(job, pp_rank)]
        elements = sum(one.bytes for one in messages(job, pp_rank) if one.axis == "shards") / 4
        expected = sent(sizes, ranks=job.shards, stage=job.zero, micro=job.micros)
        assert isclose(elements, expected, rel_tol=1e-12)


@given(jobs())
def test_what_one_rank_of_a_pipeline_sends_forward_comes_back_as_gradients(job):
    """Where all is trained, each boundary carries as many bytes both ways."""
    job = replace(job, lora_rank=0, lora_targets=())
    bytes_of = Counter()
    for pp_rank in range(job.layout.pp):
        for one in messages(job, pp_rank):
            if one.axis == "pp":
                bytes_of[one.what] += one.bytes
    assert bytes_of["activations"] == bytes_of["gradients of activations"]


def test_no_torch_is_needed():
    code = "import sys, minispeed.ledger.messages; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
