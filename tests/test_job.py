"""A run of sft is the job that its options say, and its MFU the products that it asked for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed.chat.job import job_of, memory_table, mfu_of
from minispeed.chat.sft_options import SftOptions
from minispeed.engine import Report
from minispeed.ledger.job import Job
from minispeed.ledger.memory import Memory, memory
from minispeed.model.flops import step_flops
from minispeed.model.presets import preset
from minispeed.profiles import load

CONFIG = preset("nano", vocab_size=300)
CPU = torch.device("cpu")
CHOSEN = dict(seq=64, batch=8, micro_batch=2, lr=1e-3, warmup=1, weight_decay=0.1, dtype="bf16")
REPORT = Report(loss=1.0, num_supervised=100, num_tokens=512, norm=1.0, lr=1e-3, scale=1.0, skipped=False)


def options(**given) -> SftOptions:
    return SftOptions(model="nano", data=[Path("rows.jsonl")], out=Path("run"), **CHOSEN, **given)


@given(st.integers(0, 3), st.sampled_from([1, 2]), st.sampled_from(["none", "all", "attention", "2"]), st.booleans())
def test_a_job_is_what_the_options_say(zero, tp, recompute, offload):
    given = options(zero=zero, tp=tp, recompute=recompute, offload_optimizer=offload, prefetch=7, persistence=9)
    job = job_of(given, CONFIG, 4, supervised=0.25)
    wanted = Job(
        model=CONFIG,
        devices=4,
        rows=8,
        tokens=64,
        micro_batch=2,
        layout=replace(job.layout, tp=tp),
        zero=zero,
        dtype="bf16",
        supervised=0.25,
        recompute=recompute,
        offload_optimizer=offload,
        prefetch=7,
        persistence=9,
    )
    assert job == wanted and job.layout.tp == tp
    assert memory(job) == memory(wanted)


def test_adapters_are_the_jobs():
    job = job_of(options(lora_rank=4, lora_targets=["attention.qkv"]), CONFIG, 1)
    assert (job.lora_rank, job.lora_targets) == (4, ("attention.qkv",))


@given(st.floats(0.01, 100), st.integers(1, 8))
def test_mfu_is_the_products_asked_for_over_what_the_devices_could_do(seconds, world):
    flops = step_flops(CONFIG, rows=8, tokens=64, supervised=100).model
    found = mfu_of(options(profile="h100"), CONFIG, world, CPU)(REPORT, seconds)
    assert found == pytest.approx(flops / (seconds * world * load("h100").peak["bf16"]))


@pytest.mark.parametrize("given", [{}, {"profile": "h100", "lora_rank": 4}])
def test_without_a_peak_or_with_frozen_weights_there_is_no_mfu(given, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mfu_of(options(**given), CONFIG, 1, CPU)(REPORT, 1.0) == 0


def test_a_measured_profile_divides_by_what_products_reached(tmp_path):
    rates = load("h100").rates
    replace(load("h100"), peak={}, machine="here").save(tmp_path / "here.json")
    found = mfu_of(options(profile=str(tmp_path / "here.json")), CONFIG, 1, CPU)(REPORT, 1.0)
    assert found == pytest.approx(step_flops(CONFIG, rows=8, tokens=64, supervised=100).model / rates[0].flops["bf16"])


def test_the_table_has_both_of_each_category_and_the_host_where_there_is_one():
    says = Memory(parameters=10**6, gradients=2 * 10**6, optimizer=0, activations=3 * 10**6, buffers=-(10**6))
    text = "\n".join(memory_table(says, replace(says, buffers=0)))
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:]}
    assert list(lines) == ["parameters", "gradients", "optimizer", "activations", "buffers", "total"]
    assert lines["buffers"][0] == "-1" and lines["total"] == ["5", "MB", "6", "MB"]
    assert "host" in memory_table(says, replace(says, host=1))[-1]
