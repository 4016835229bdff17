"""The planner's search misses nothing, its tables are its estimates, and its words are those of a user's question."""

import json
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import given, settings, strategies as st

from minispeed.__main__ import COMMANDS, main
from minispeed.chat.commands import SftOptions
from minispeed.errors import UserError
from minispeed.ledger.memory import peak
from minispeed.model.config import GPTConfig
from minispeed.model.presets import preset
from minispeed.options import parse
from minispeed.plan import search as searching
from minispeed.plan.estimate import Estimator
from minispeed.plan.report import why_not
from minispeed.plan.request import Request, choices, line_of
from minispeed.plan.search import fits, search
from minispeed.plan.space import all_jobs, is_able, job_of, layouts, settings as open_settings
from minispeed.plan.step import step
from minispeed.plan.why import changes
from minispeed.profiles import load


@st.composite
def requests(draw, most=4):
    kv = draw(st.sampled_from([1, 2, 3, 4]))
    config = GPTConfig(
        vocab_size=draw(st.sampled_from([50, 300])),
        max_positions=64,
        num_layers=draw(st.integers(1, 4)),
        model_dim=draw(st.sampled_from([16, 32])),
        num_heads=kv * draw(st.integers(1, 2)),
        num_kv_heads=kv,
        head_dim=8,
        hidden_dim=draw(st.sampled_from([24, 48])),
        tied=draw(st.booleans()),
        attention=draw(st.sampled_from(["fused", "reference"])),
    )
    request = Request(
        model=config,
        devices=draw(st.integers(1, most)),
        rows=draw(st.sampled_from([2, 4, 6, 8])),
        tokens=draw(st.sampled_from([8, 32])),
        memory=10**12,
        profile=load(draw(st.sampled_from(["h100", "l4"]))),
        lora_rank=draw(st.sampled_from([0, 0, 2])),
    )
    sizes = [peak(job).total for job in all_jobs(request)]  # a budget that some candidates keep to, or all, or none
    share = draw(st.floats(-0.1, 1.1))
    least, most = min(sizes, default=1), max(sizes, default=1)
    return replace(request, memory=max(1, round(least + share * (most - least))))


def said(job):
    """What of a job's choices means something: of an axis of one rank, how it cuts does not."""
    known = choices(job)
    lone = {"pp": ("schedule", "virtual"), "sp": ("sequence",), "tp": ("tokens",)}
    empty = {name for axis, names in lone.items() if known[axis] == 1 for name in names}
    return [(name, value) for name, value in known.items() if name not in empty]


@settings(max_examples=settings.default.max_examples // 4)
@given(requests())
def test_the_search_finds_what_looking_at_each_candidate_finds(request):
    estimator, found = Estimator(request), search(request)
    jobs = list(all_jobs(request))
    assert found.count == len(jobs)
    fitting = [(estimator.of(job).total, said(job)) for job in jobs if fits(request, peak(job), job)]
    best = {}
    for seconds, values in fitting:
        for value in values:
            best[value] = min(seconds, best.get(value, seconds))
    assert {value: one.step.total for value, one in found.best.items()} == pytest.approx(best, rel=1e-12)
    assert bool(found.ranked) == bool(fitting)
    groups = {}
    for seconds, values in fitting:
        group = tuple(value for name, value in values if name in ("dp", "pp", "sp", "tp", "zero"))
        groups[group] = min(seconds, groups.get(group, seconds))
    fastest = sorted(groups.values())[: searching.RANKED]
    assert sorted(estimator.of(one.job).total for one in found.ranked) == pytest.approx(fastest, rel=1e-12)
    if jobs and not fitting:
        assert min(one.memory.total for one in found.least.values()) == min(peak(job).total for job in jobs)


@settings(max_examples=settings.default.max_examples // 4)
@given(requests())
def test_a_table_holds_the_estimate_of_each_of_its_candidates(request):
    estimator = Estimator(request)
    for layout in layouts(request)[0]:
        open_ones = open_settings(request, layout)
        if not all(open_ones):
            continue
        totals = estimator.totals(layout, open_ones)
        assert totals.shape == tuple(map(len, open_ones))
        for z, zero in enumerate(open_ones.zero):
            for o, offload in enumerate(open_ones.offload):
                for r, recompute in enumerate(open_ones.recompute):
                    for b, micro in enumerate(open_ones.micro_batch):
                        if is_able(zero, offload):
                            chosen = dict(zero=zero, offload=offload, recompute=recompute, micro_batch=micro)
                            one = Estimator(request).of(job_of(request, layout, **chosen))
                            assert totals[z, o, r, b] == pytest.approx(one.total, rel=1e-12)


@settings(max_examples=settings.default.max_examples // 4)
@given(requests(most=8))
def test_without_a_pipeline_an_estimate_is_what_simulating_says(request):
    estimator = Estimator(request)
    for job in all_jobs(request):
        if job.layout.pp == 1:
            assert estimator.of(job).total == pytest.approx(step(job, request.profile).seconds, rel=1e-9)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb_h1", "interleaved"])
@pytest.mark.parametrize("model", ["nano", "gpt2"])
def test_a_pipelines_estimate_is_about_what_simulating_says(schedule, model):
    """Interleaved stages of unlike lengths apart, within a tenth."""
    fixed = {"offload": "none", "recompute": "none", "zero": 0, "schedule": schedule}
    request = asked(model=preset(model), devices=4, rows=16, tokens=64, profile=load("l4"), fixed=fixed)
    estimator = Estimator(request)
    jobs = [job for job in all_jobs(request) if job.layout.pp > 1]
    ratios = [estimator.of(job).total / step(job, request.profile).seconds for job in jobs]
    assert jobs and min(ratios) > (0.75 if schedule == "interleaved" else 0.85) and max(ratios) < 1.1


def asked(**changes):
    plain = dict(
        model=preset("gpt2-large"), devices=8, rows=64, tokens=1024, memory=8 * 10**9, profile=load("a100-40gb")
    )
    return Request(**(plain | changes))


def test_losers_are_told_why():
    lines = why_not(search(asked()))
    assert "tp 8: heads 20 do not divide" in lines
    assert any(line.startswith("zero 0: needs 1") and "of 8 GB as the best is laid out" in line for line in lines)
    assert any(line.startswith("zero 3: gathers take") for line in lines)
    assert any(line.startswith("schedule gpipe:") for line in lines)


def test_where_nothing_fits_single_changes_are_offered_and_do():
    found = search(asked(model=preset("llama-3.2-1b"), devices=1, rows=8, memory=6 * 10**9))
    assert not found.ranked and found.least
    offered = {change.text: change.fitting for change in changes(found)}
    assert any(text.endswith(" devices") for text in offered)
    assert "LoRA, of rank 8" in offered
    assert all(peak(one.job).total == one.memory.total for one in offered.values())


@pytest.mark.parametrize(
    ("changes_", "message"),
    [
        ({"devices": 0}, "a plan for 0 devices"),
        ({"dtype": "fp8"}, "no dtype is called 'fp8'"),
        ({"dtype": "bf16", "profile": load("v100")}, "has no products in bf16"),
        ({"tokens": 2048}, "rows of 2048 tokens, and the model reads 1024"),
        ({"fixed": {"stage": 3}}, "a plan has no choice 'stage'"),
        ({"fixed": {"zero": 4}}, "zero is fixed at 4"),
    ],
)
def test_a_request_that_cannot_be_is_a_sentence(changes_, message):
    with pytest.raises(UserError, match=message):
        asked(**changes_)


def test_fixed_choices_are_kept_and_what_forbids_them_is_said():
    found = search(asked(memory=80 * 10**9, fixed={"tp": 2, "zero": 3, "micro_batch": 4}))
    assert {(one.job.layout.tp, one.job.zero, one.job.micro_batch) for one in found.ranked} == {(2, 3, 4)}
    for fixed, why in (({"tp": 3}, "does not divide 8 devices"), ({"tp": 8}, "heads 20 do not divide")):
        found = search(asked(fixed=fixed))
        assert not found.ranked and [
            one.reason for one in found.refusals if (one.name, one.value) in fixed.items()
        ] == [why]


def test_the_words_are_those_of_the_table():
    """What is said of a value is of the fastest candidate that has it, simulated, as a request that fixes it finds."""
    found = search(asked())
    for line in why_not(found):
        if line.startswith(("zero 3: ", "pp 2: ", "recompute all: ")):
            name, value = line.split(": ")[0].split()
            alone = search(asked(fixed={name: int(value) if value.isdecimal() else value})).ranked[0]
            more = 100 * (alone.step.total / found.ranked[0].step.total - 1)
            assert f"{more:.0f} % slower ({line_of(alone.job)})" in line


def test_512_devices_need_few_looks_at_memory():
    request = asked(model=preset("llama-3.2-1b"), devices=512, rows=512, memory=24 * 10**9, profile=load("l4"))
    with mock.patch.object(searching, "peak", side_effect=peak) as looked:
        found = search(request)
    assert found.count > 50_000 and looked.call_count < 1_500


ARGS = ["plan", "--model", "gpt2-large", "--devices", "8", "--seq", "1024", "--batch", "64", "--profile", "a100-40gb"]


def test_the_command_prints_a_plan_and_writes_a_configuration_that_sft_takes(tmp_path, capsys):
    out = tmp_path / "config.json"
    assert main([*ARGS, "--memory", "8GiB", "--out", str(out), "--top", "3"]) == 0
    printed = capsys.readouterr().out
    assert "of 8.59 GB" in printed and "Why not" in printed and "The best: " in printed
    words = ["--config", str(out), "--data", "chats.jsonl", "--out", str(tmp_path / "run")]
    options = parse(words, SftOptions, commands=COMMANDS)
    assert options.ranks == 8 == options.dp * options.pp * options.sp * options.tp
    assert (options.model, options.seq, options.batch) == ("gpt2-large", 1024, 64)
    assert main(["simulate", "--config", str(out)]) == 0
    assert "gpt2-large on 8 x a100-40gb" in capsys.readouterr().out
    assert main([*ARGS, "--memory", "8GB", "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_command_says_what_would_fit(capsys):
    assert main([*ARGS, "--memory", "3 GB", "--dp", "8", "--zero", "0"]) == 1
    printed = capsys.readouterr().out
    assert "Nothing fits." in printed and "zero left open: " in printed and "dp left open: " in printed


@pytest.mark.parametrize("size", ["24GiB", "24 gb", "24e9"])
def test_sizes_are_read_as_people_write_them(size, capsys):
    assert main([*ARGS, "--memory", size, "--json", "--top", "1"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ranked"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "lots"], "got 'lots'"),
        (["--memory", "0"], "got '0'"),
        (["--memory", "24"], "--memory 24 is 24 bytes"),
        (["--devices", "0"], "at least 1"),
        (["--model", "gpt3"], "no preset is called 'gpt3'"),
        (["--profile", "h1000"], "no profile is called 'h1000'"),
    ],
)
def test_bad_words_are_sentences(words, message, capsys):
    left = [word for at, word in enumerate(ARGS) if not {ARGS[at], ARGS[at - 1]} & {words[0]}]
    assert main([*left, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_profile_of_another_machine_is_told(tmp_path, capsys):
    path = tmp_path / "theirs.json"
    replace(load("l4"), machine="a Cray-1, 1 cores").save(path)
    assert main([*ARGS[:-1], str(path), "--top", "1"]) == 0
    assert "was measured on a Cray-1" in capsys.readouterr().err


def test_planning_imports_no_torch():
    code = f"import sys; from minispeed.__main__ import main; main({ARGS!r}); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False).returncode == 0
