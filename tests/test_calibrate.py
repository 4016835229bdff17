"""Laws of calibrating: what is measured is a whole profile, lines are fitted exactly, nothing old is lost."""

import json
import os
import statistics
import sys
from math import isfinite

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed.__main__ import main
from minispeed.chat import calibrate as module
from minispeed.chat.calibrate import fit, host_memory, profile_of, table
from minispeed.chat.speeds import QUICK, TINY, Sample, check_model, collectives, measure, products, seconds_of
from minispeed.collective.group import SoloGroup
from minispeed.collective.launch import launch
from minispeed.collective.threads import run_threads
from minispeed.collective.world import World
from minispeed.precision import DTYPES
from minispeed.profiles import check_machine, load, this_machine
from minispeed.published import PUBLISHED

CPU = torch.device("cpu")


def test_the_command_measures_and_writes_a_whole_profile(tmp_path, capfd):
    path = tmp_path / "mine" / "profile.json"
    assert main(["calibrate", "--quick", "--ranks", "2", "--threads", "1", "--out", str(path)]) == 0
    out, err = capfd.readouterr()
    profile = load(path)
    assert not err, "quiet where nobody watches"
    assert f"--profile {path}" in out and "2 busy, fp32:" in out
    assert check_machine(profile) == "" and profile.machine == this_machine() and profile.on_cpu
    assert profile.per_machine == 2 and profile.memory == profile.host_memory // 2 == host_memory() // 2
    (rates,) = profile.rates
    assert rates.ranks == 2 and {"fp32", "fp64"} <= set(rates.flops) == set(rates.attention) == set(rates.between)
    figures = [rates.bandwidth, rates.overhead, rates.link.bandwidth, *rates.flops.values(), *rates.between.values()]
    assert all(isfinite(figure) and figure > 0 for figure in figures) and rates.link.latency >= 0
    assert profile.between == rates.link and profile.peak == {}


def test_a_run_that_fails_leaves_the_old_profile(tmp_path, monkeypatch, capsys):
    PUBLISHED["h100"].save(tmp_path / "profile.json")

    def fail(*words, **how):
        raise RuntimeError("a rank is gone")

    monkeypatch.setattr(module, "launch", fail)
    assert main(["calibrate", "--quick", "--out", str(tmp_path / "profile.json")]) == 1
    assert "a rank is gone" in capsys.readouterr().err
    assert load(tmp_path / "profile.json") == PUBLISHED["h100"]


def test_under_torchrun_it_says_what_to_type(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert main(["calibrate"]) == 2
    assert "try: minispeed calibrate" in capsys.readouterr().err


@given(
    st.floats(0, 1e-2),
    st.floats(1e6, 1e12),
    st.lists(
        st.tuples(st.integers(1, 14), st.integers(1, 10**9)), min_size=2, unique_by=lambda pair: pair[1] / pair[0]
    ),
)
def test_a_line_through_all_samples_is_found(latency, bandwidth, calls):
    samples = [Sample("call", n, size, n * latency + size / bandwidth) for n, size in calls]
    found = fit(samples)
    for n, size in calls:
        assert found.seconds(size, n) == pytest.approx(n * latency + size / bandwidth, rel=1e-3)


@given(st.lists(st.floats(1e-7, 10), min_size=4, max_size=4), st.integers(1, 14))
def test_a_fit_is_a_link_whatever_was_measured(times, messages):
    samples = [Sample("call", messages, 16.0**place, seconds) for place, seconds in enumerate(times, start=3)]
    found = fit(samples)
    assert 0 <= found.latency < 100 and 0 < found.bandwidth and isfinite(found.bandwidth)


@given(st.lists(st.floats(1e-4, 1e-3), min_size=3, max_size=3), st.floats(1e-6, 1e-5))
def test_a_fit_is_as_near_as_any_other_link(noise, latency):
    samples = [
        Sample("call", 1, 10.0**place, latency + 10.0**place / 1e9 + more) for place, more in zip((3, 5, 7), noise)
    ]

    def missed(link):
        return sum((link.seconds(s.bytes, s.messages) / s.seconds - 1) ** 2 for s in samples)

    best = fit(samples)
    for by in (0.9, 1.1):
        assert missed(best) <= missed(best.__class__(latency=best.latency * by, bandwidth=best.bandwidth)) + 1e-12
        assert missed(best) <= missed(best.__class__(latency=best.latency, bandwidth=best.bandwidth * by)) + 1e-12


@pytest.mark.parametrize("ranks", [2, 3])
def test_ring_messages_and_bytes_are_counted_as_a_ring_sends_them(ranks):
    samples = run_threads(lambda group: collectives(World(group, CPU), QUICK), ranks)
    assert len({tuple(s[:3] for s in each) for each in samples}) == 1, "all ranks make the same calls"
    sizes = [-(-size // (4 * ranks)) * ranks * 4 for size in QUICK.messages]
    part = (ranks - 1) / ranks
    shares = {
        "all_reduce": (2 * (ranks - 1), 2 * part),
        "reduce_scatter": (ranks - 1, part),
        "all_gather": (ranks - 1, part),
        "exchange": (1, 1),
    }
    expected = [(call, messages, share * size) for size in sizes for call, (messages, share) in shares.items()]
    assert [tuple(sample[:3]) for sample in samples[0]] == expected


def test_one_rank_measures_all_but_links():
    (found,) = launch(measure, True, 0, tuple(DTYPES), ranks=1)
    assert found["samples"] == []
    profile = profile_of({1: [found]}, on_gpu=False)
    assert profile.rates[0].link == profile.host == profile.between
    assert json.loads(json.dumps(profile.to_dict()))["rates"][0]["ranks"] == 1
    lines = table(profile).splitlines()
    assert len({len(line) for line in lines[-2:]}) == 1 and "busy ranks" in lines[-2]


def test_a_dtype_without_products_is_left_out():
    (found,) = launch(measure, True, 0, ("fp32", "fp64"), ranks=1)
    found["flops"]["fp64"] = 0.0
    profile = profile_of({1: [found]}, on_gpu=False)
    assert set(profile.rates[0].flops) == {"fp32"}


def test_a_call_is_timed_over_as_many_as_fill_the_window(monkeypatch):
    clock = iter(range(10**6))
    calls = []
    monkeypatch.setattr("minispeed.chat.speeds.time.perf_counter", lambda: float(len(calls)) * 0.25)
    seconds = seconds_of(World(SoloGroup(), CPU), lambda: calls.append(next(clock)), 10.0)
    assert seconds == 0.25 and len(calls) >= 3 * 10


def test_the_flops_of_a_product_are_six_for_each_weight_and_token(monkeypatch):
    monkeypatch.setattr("minispeed.chat.speeds.seconds_of", lambda world, work, window: (work(), 2.0)[1])
    rates = [6 * n * a * b / 2 for n, a, b in QUICK.products]
    assert products(World(SoloGroup(), CPU), QUICK, torch.float32) == statistics.median(rates)


def test_the_models_that_check_are_as_small_as_they_should_be():
    assert TINY.model_dim == 8 and check_model(QUICK).model_dim == QUICK.head_dim


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of groups of processes are Linux's")
def test_memory_is_what_this_group_of_processes_may_use(tmp_path, monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for text, size in {"max": whole, "1000": 1000, str(2**70): whole}.items():
        (tmp_path / "memory.max").write_text(text + "\n")
        monkeypatch.setattr(module, "CGROUP", tmp_path / "memory.max")
        assert host_memory() == size
    monkeypatch.setattr(module, "CGROUP", tmp_path / "nowhere")
    assert host_memory() == whole
