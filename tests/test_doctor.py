"""Laws of the doctor's report: all that it found is in it, what fails is said, a wrong sum is not a measurement."""

import json
import platform
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed.__main__ import main
from minispeed.chat import doctor
from minispeed.chat.doctor import (
    BYTES,
    all_reduces,
    as_text,
    asked,
    examine,
    free_gb,
    measure_all_reduce,
    product_speed,
    several_gpus_hint,
    time_all_reduce,
)
from minispeed.collective.group import Done, SoloGroup
from minispeed.collective.launch import launch
from minispeed.collective.world import World
from minispeed.precision import DTYPES

CPU = torch.device("cpu")


@pytest.fixture
def three_gpus(monkeypatch):
    """Let torch say that it has three GPUs, of which the last reads nobody's memory."""
    gpu = SimpleNamespace(name="NVIDIA T1000", total_memory=3 * 2**32)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a != 2)
    monkeypatch.setattr(doctor, "product_speed", lambda device, dtype: 100.0 if dtype == torch.bfloat16 else None)


def test_the_command_prints_json_and_text(capsys):
    assert main(["doctor", "--json", "--ranks", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["all_reduce"] == [] and found["free_gb"]["here"] > 0
    assert set(found["products"]["cpu"]) == set(DTYPES)
    assert main(["doctor", "--ranks", "0"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and found["cpu"]["model"] in text
    assert "all-reduce" not in text


def test_without_a_gpu_the_report_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = examine(0)
    assert found["gpus"] == found["links"] == [] and found["hint"] is None
    assert "no GPU that torch can use" in as_text(found) and "GPU 0" not in as_text(found)


def test_with_several_gpus_the_report_shows_each_and_how_to_use_them(three_gpus):
    found = examine(0)
    text = as_text(found)
    assert found["links"] == [[True, True, True], [True, True, True], [False, False, True]]
    assert [line.split()[2:] for line in text.splitlines() if line.startswith("links")] == [
        ["0", "1", "2"],
        ["0", "-", "yes", "yes"],
        ["1", "yes", "-", "yes"],
        ["2", "no", "no", "-"],
    ]
    assert text.count("NVIDIA T1000, 12.0 GiB") == 3 and list(found["products"]) == [
        "cpu",
        "cuda:0",
        "cuda:1",
        "cuda:2",
    ]
    assert text.count("fp32 not supported, bf16 100") == 4
    assert "torchrun --nproc-per-node 3 " in text


@given(st.floats(0.1, 1e6), st.floats(0.5, 2.0))
def test_bf16_is_fast_where_it_beats_fp32_by_a_third(fp32, ratio):
    line = doctor.speed_line({"fp32": fp32, "bf16": ratio * fp32})
    assert line.endswith("bf16 is fast here" if ratio * fp32 >= 1.3 * fp32 else "bf16 is not fast here")
    assert doctor.speed_line({"fp32": fp32, "bf16": None}).endswith("bf16 is not fast here")


@given(st.integers(0, 3), st.booleans(), st.sampled_from([["doctor"], ["sft", "--out", "my runs/a"]]))
def test_the_hint_is_a_line_that_uses_all_gpus(count, started, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(doctor, "under_torchrun", lambda: started)
        patch.setattr(sys, "argv", ["minispeed", *words])
        hint = several_gpus_hint()
    if count < 2 or started:
        assert hint is None
    else:
        end = "sft --out 'my runs/a'" if words[0] == "sft" else "sft ..."
        assert hint is not None and hint.endswith(f"torchrun --nproc-per-node {count} -m minispeed {end}")


def test_under_torchrun_the_doctor_asks_to_be_run_alone(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert main(["doctor"]) == 2
    assert "try: minispeed doctor" in capsys.readouterr().err


def test_two_processes_are_measured():
    row = measure_all_reduce("gloo", 2)
    assert row["backend"] == "gloo" and row["ranks"] == 2
    assert row["gb_per_s"] == pytest.approx(BYTES / row["seconds"] / 1e9)
    assert f"{row['seconds'] * 1e3:.1f} ms" in doctor.all_reduce_line(row)


@given(st.integers(1, 3))
def test_every_rank_returns_its_seconds(ranks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "BYTES", 400)
        assert all(seconds > 0 for seconds in launch(time_all_reduce, ranks=ranks))


class Corrupt(SoloGroup):
    """A group whose last element arrives wrong."""

    def all_reduce(self, x, op="sum"):
        x[-1] = 2
        return Done()


def test_a_wrong_sum_is_no_measurement():
    with pytest.raises(RuntimeError, match="not 1 everywhere"):
        time_all_reduce(World(Corrupt(), CPU))


def test_processes_that_cannot_speak_are_a_line_of_the_report(monkeypatch):
    def broken(*args, **more):
        raise ConnectionError("no route")

    monkeypatch.setattr(doctor, "launch", broken)
    line = doctor.all_reduce_line(measure_all_reduce("gloo", 5))
    assert line.endswith("between 5 processes over gloo failed: ConnectionError: no route")


@pytest.mark.parametrize("gpus", [0, 1, 3])
@pytest.mark.parametrize("ranks", [0, 1, 4])
def test_gloo_has_as_many_ranks_as_asked_for_and_nccl_every_gpu(monkeypatch, ranks, gpus):
    asked_for = []

    def fake(fn, *, ranks, backend, timeout):
        asked_for.append((backend, ranks))
        return [0.5] * ranks

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(doctor, "launch", fake)
    rows = all_reduces(ranks)
    expected = [("gloo", ranks)] + ([("nccl", gpus)] if gpus > 1 else [])
    assert asked_for == (expected if ranks else [])
    for row in rows:
        assert row["gb_per_s"] == pytest.approx(2 * (row["ranks"] - 1) / row["ranks"] * BYTES / 0.5 / 1e9)


def test_a_dtype_without_a_product_is_not_supported():
    assert product_speed(CPU, torch.bool) is None
    assert product_speed(CPU, torch.float32) > 0


def test_a_program_is_asked_or_it_is_not_there():
    assert asked(sys.executable, "-c", "print('one'); print('two')") == "one"
    assert asked(sys.executable, "-c", "raise SystemExit(3)") is None
    assert asked("minispeed-has-no-such-program") is None


def test_the_cache_need_not_be_there_yet(tmp_path):
    assert free_gb(tmp_path / "not" / "yet") == pytest.approx(free_gb(tmp_path), rel=0.1)
