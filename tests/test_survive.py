"""Laws of a run that something happens to: killed, asked to stop, short of disk, given bad numbers or other data."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file

from minispeed.__main__ import main
from minispeed.chat import chat_model, interrupts, preflight
from minispeed.chat.conversation import ASSISTANT, USER, Conversation, Turn
from minispeed.chat.examine import Examiner
from minispeed.chat.run import RunDirectory
from minispeed.chat.samples import page_of
from minispeed.chat.sft import run_rank
from minispeed.chat.sft_options import SftOptions
from minispeed.chat.trainer import Trainer
from minispeed.checkpoint import write
from minispeed.collective.launch import launch
from minispeed.runner import Runner

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6


def tool(name: str) -> ModuleType:
    """Import a file of tools/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


survive = tool("survive")


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    return survive.write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


def words(out: Path, chats: Path, *more: str) -> list[str]:
    """Return a command of a few steps of nano; what `more` says of an option counts."""
    said = f"--model nano --data {chats} --out {out} --cache {chats.parent / 'cache'} --seq 64 --batch 4 --dtype fp32"
    said += (
        f" --vocab-size 300 --warmup 2 --threads 1 --steps {STEPS} --score 0 --max-new 4 --eval-every 2 --save-every 9"
    )
    pairs = list(zip(said.split()[::2], said.split()[1::2]))
    return ["sft", *(word for pair in pairs if pair[0] not in more for word in pair), *more]


def sft(out: Path, chats: Path, *more: str) -> int:
    return main(words(out, chats, *more))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, chats) -> Path:
    """Make one run that nothing happens to, with prompts."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    (out.parent / "prompts.txt").write_text("red 1 say cat\n\nred 2 say dog\n")
    assert sft(out, chats, "--prompts", str(out.parent / "prompts.txt")) == 0
    return out


def prompts_of(straight: Path) -> list[str]:
    return ["--prompts", str(straight.parent / "prompts.txt")]


def updates(run: Path) -> list[int]:
    return [record["step"] for record in RunDirectory(run).records("metrics.jsonl") if "norm" in record]


def evaluations(run: Path) -> list[dict]:
    return [record for record in RunDirectory(run).records("metrics.jsonl") if "eval_loss" in record]


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(run / "model.safetensors") for run in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def named(run: Path, pointer: str = "last") -> int:
    return int((run / "checkpoints" / pointer).read_text().strip().removeprefix("step-"))


def before_update(monkeypatch, step: int, happen) -> None:
    """Let something happen before the update that makes this step, once."""
    plain, happened = Trainer.update, []

    def update(trainer: Trainer) -> None:
        if trainer.engine.step + 1 == step and not happened:
            happened.append(step)
            happen(trainer)
        plain(trainer)

    monkeypatch.setattr(Trainer, "update", update)


def damage(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---- pre-flight


@pytest.mark.parametrize("layout", [{}, {"ranks": 2, "zero": 3}, {"ranks": 2, "pp": 2, "micro_batch": 2}], ids=str)
def test_a_run_with_preflight_is_the_run_without(layout, chats, tmp_path):
    def train(name: str, **more) -> Path:
        said = {"model": "nano", "data": [chats], "out": tmp_path / name, "cache": chats.parent / "cache", "seq": 64}
        said |= {"batch": 4, "vocab_size": 300, "threads": 1, "steps": 3, "dtype": "fp32", "score": 0, "max_new": 4}
        launch(run_rank, SftOptions(**said, **layout, **more), ranks=layout.get("ranks", 1))
        return tmp_path / name

    drawn = torch.get_rng_state()
    with_it, without = train("with"), train("without", preflight=False)
    assert torch.equal(drawn, torch.get_rng_state())
    assert same(with_it, without) and updates(with_it) == [1, 2, 3]
    measured = [RunDirectory(run).records("metrics.jsonl") for run in (with_it, without)]
    for one, other in zip(*measured, strict=True):
        assert {**one, "seconds": 0, "tokens_per_second": 0} == {**other, "seconds": 0, "tokens_per_second": 0}
    there = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (with_it, without)]
    assert there[0] == there[1]


def no_memory(*args, **kwargs) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more words")


def no_disk(*args) -> None:
    raise OSError(28, "No space left on device")


def other_bytes(folder, *args, save=preflight.checkpoint.save) -> None:
    save(folder, *args)
    damage(folder / "rank-00000.safetensors")


AHEAD = {
    "pre-flight, forward and backward: CUDA out of memory. Tried to allocate 2 GiB\n": (Runner, "train", no_memory),
    "pre-flight, evaluation: CUDA out of memory": (Examiner, "loss_on", no_memory),
    "pre-flight, answer: CUDA out of memory": (Examiner, "answers", no_memory),
    "pre-flight, checkpoint: could not write": (write, "write_tensors", no_disk),
    "pre-flight, checkpoint: ": (preflight.checkpoint, "save", other_bytes),
    "pre-flight, disk: 3 checkpoints of 10.7 MB and the model, 30 MB free": (
        preflight.shutil,
        "disk_usage",
        lambda path: type("Usage", (), {"free": 30e6}),
    ),
}


@pytest.mark.parametrize(("message", "broken"), AHEAD.items(), ids=AHEAD)
def test_what_would_fail_later_fails_before_step_1_and_leaves_room_for_the_next_try(
    message, broken, chats, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(*broken)
        assert sft(tmp_path / "run", chats) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and "step 0" not in said.out
    assert sft(tmp_path / "run", chats, "--steps", "1") == 0


# ---- what a crash loses: nothing


def test_a_crash_in_an_evaluation_loses_nothing(straight, chats, tmp_path, monkeypatch):
    plain = Examiner.measure

    def measure(examiner: Examiner, **how):
        if examiner.engine.step == 4:
            raise RuntimeError("a crash")
        return plain(examiner, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Examiner, "measure", measure)
        assert sft(tmp_path / "run", chats, *prompts_of(straight)) == 1
    assert named(tmp_path / "run") == 4
    assert sft(tmp_path / "run", chats, *prompts_of(straight), "--resume") == 0
    assert same(straight, tmp_path / "run") and updates(tmp_path / "run") == updates(straight)
    assert evaluations(tmp_path / "run") == evaluations(straight)
    assert (tmp_path / "run" / "samples.md").read_text() == (straight / "samples.md").read_text()
    assert named(tmp_path / "run", "best") == named(straight, "best")


def test_prompts_are_answered_at_every_moment_and_after_an_interruption_too(straight, chats, tmp_path, monkeypatch):
    page = (straight / "samples.md").read_text()
    assert page.count("\n## Prompt ") == 2 and "> red 2 say dog" in page
    for step in (0, 2, 4, 6):
        assert page.count(f"\n| {step} | ") == 2
    with monkeypatch.context() as patch:
        before_update(patch, 4, lambda trainer: signal.raise_signal(signal.SIGINT))
        assert sft(tmp_path / "run", chats, *prompts_of(straight)) == 130
    page_of_then = (tmp_path / "run" / "samples.md").read_text()
    assert "\n| 4 | " in page_of_then and "\n| 6 | " not in page_of_then
    with (tmp_path / "run" / "prompts.jsonl").open("a") as file:  # of a run that was lost after its checkpoint
        file.write('{"step": 5, "prompt": "red 1 say cat", "answer": "lost", "stopped": true}\n{"step": 5, "pro')
    assert sft(tmp_path / "run", chats, *prompts_of(straight), "--resume") == 0
    assert (tmp_path / "run" / "samples.md").read_text() == page


@given(st.lists(st.tuples(st.text(), st.booleans()), max_size=4), st.text(min_size=1), st.text())
def test_any_answer_fits_a_cell(answers, asked, wanted):
    prompt = Conversation((Turn(USER, asked), Turn(ASSISTANT, wanted)))
    lines = [{"step": n, "prompt": asked, "answer": text, "stopped": whole} for n, (text, whole) in enumerate(answers)]
    page = page_of([prompt], lines)
    rows = [line for line in page.split("\n") if line.startswith("| ")]
    assert len(rows) == 2 + len(answers) + bool(wanted)
    assert all(row.replace("\\|", "").count("|") == 3 and row.endswith(" |") for row in rows)


def test_each_held_out_file_is_measured_alone_and_the_first_decides(chats, tmp_path, capsys):
    second = tmp_path / "second.jsonl"
    second.write_text("\n".join(chats.read_text().replace("say", "tell").splitlines()[:9]))
    losses = {}
    for name, files in {"one": [chats], "other": [second], "both": [chats, second]}.items():
        more = [word for file in files for word in ("--eval-data", str(file))]
        assert sft(tmp_path / name, chats, "--tokenizer", str(tokenizer_in(chats)), *more) == 0
        losses[name] = evaluations(tmp_path / name)
    for one, other, both in zip(losses["one"], losses["other"], losses["both"], strict=True):
        assert list(both["eval_files"]) == ["chats", "second"] and both["eval_loss"] == both["eval_files"]["chats"]
        assert both["eval_files"]["chats"] == pytest.approx(one["eval_loss"], rel=1e-6)
        assert both["eval_files"]["second"] == pytest.approx(other["eval_loss"], rel=1e-6)
    table = capsys.readouterr().out.rpartition("held-out file")[2].splitlines()
    after = [f"{loss:.3f}" for loss in losses["both"][-1]["eval_files"].values()]
    assert [line.split()[0] for line in table[1:3]] == ["chats", "second"]
    assert [line.split()[3] for line in table[1:3]] == after


def tokenizer_in(chats: Path) -> Path:
    """Learn a tokenizer from the chats, once."""
    if not (chats.parent / "prepared").exists():
        assert main(["prepare", str(chats), "--out", str(chats.parent / "prepared"), "--vocab-size", "300"]) == 0
    return chats.parent / "prepared" / "tokenizer.json"


# ---- asked to stop


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(straight, chats, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        before_update(patch, 3, lambda trainer: signal.raise_signal(signal.SIGTERM))
        assert sft(tmp_path / "run", chats) == 143
    assert "stopped at step 3 of 6, saved" in capsys.readouterr().out and named(tmp_path / "run") == 3
    assert sft(tmp_path / "run", chats, "--resume") == 0
    assert same(straight, tmp_path / "run") and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("apart", [0.0, 60.0], ids=["a second request", "the same request by two ways"])
def test_a_second_sigterm_stops_at_once_unless_it_is_the_first(apart, chats, tmp_path, monkeypatch):
    def twice(trainer: Trainer) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(interrupts, "AGAIN", apart)
    before_update(monkeypatch, 3, twice)
    if apart:
        assert sft(tmp_path / "run", chats) == 143 and named(tmp_path / "run") == 3
    else:
        with pytest.raises(SystemExit) as ended:
            sft(tmp_path / "run", chats)
        assert ended.value.code == 143 and named(tmp_path / "run") == 2


def test_the_launcher_hands_sigterm_on_to_its_ranks(chats, tmp_path):
    command = [sys.executable, "-m", "minispeed", *words(tmp_path / "run", chats, "--ranks", "2", "--steps", "5000")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    survive.until(lambda: len(updates_so_far(tmp_path / "run")) > 1, "two steps")
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "saved in" in said
    assert named(tmp_path / "run") == updates_so_far(tmp_path / "run")[-1]


def updates_so_far(run: Path) -> list[int]:
    return [int(line["step"]) for line in survive.lines_of(run / "metrics.jsonl") if "norm" in line]


# ---- a full disk


def full_at(monkeypatch, steps: set[int]) -> None:
    """Let the disk be full while checkpoints of these steps are written."""
    plain, now = write.write_tensors, [0]
    update = Trainer.update

    def write_tensors(*args):
        if now[0] in steps:
            no_disk()
        return plain(*args)

    def watched(trainer: Trainer) -> None:
        update(trainer)
        now[0] = trainer.engine.step

    monkeypatch.setattr(write, "write_tensors", write_tensors)
    monkeypatch.setattr(Trainer, "update", watched)


@pytest.mark.parametrize("how", ["--save-async", "--no-save-async"])
def test_a_save_that_fails_costs_that_save_alone(how, straight, chats, tmp_path, monkeypatch, capsys):
    full_at(monkeypatch, {2, 3})
    assert sft(tmp_path / "run", chats, how, "--save-every", "1", "--keep-last", "9") == 0
    said = capsys.readouterr().err
    assert "No space left on device" in said and "Traceback" not in said
    assert "step 2 is not saved, and the run goes on; the last good checkpoint is" in said
    assert same(straight, tmp_path / "run") and updates(tmp_path / "run") == updates(straight)
    there = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert there == {f"step-{step:08d}" for step in (1, 4, 5, 6)}


def test_a_last_save_that_fails_is_a_sentence_and_another_exit_code(chats, tmp_path, monkeypatch, capsys):
    full_at(monkeypatch, {5, 6})
    assert sft(tmp_path / "run", chats) == 1
    said = capsys.readouterr()
    assert "not all of the run is saved; the last good checkpoint is" in said.err and "step-00000004" in said.err
    assert "step 6: held-out loss" in said.out and named(tmp_path / "run") == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_disk_is_full_takes_the_others_along(rank, chats, tmp_path, monkeypatch):
    def only(path, *rest, plain=write.write_tensors):
        return no_disk() if f"rank-{rank:05d}" in str(path) else plain(path, *rest)

    said = {"model": "nano", "data": [chats], "out": tmp_path / "run", "cache": chats.parent / "cache", "seq": 64}
    said |= {"batch": 4, "vocab_size": 300, "threads": 1, "steps": 3, "dtype": "fp32", "score": 0, "preflight": False}
    if rank:
        monkeypatch.setattr(write, "write_tensors", only)
    else:  # the model, which this rank alone writes
        monkeypatch.setattr(chat_model, "save_file", no_disk)
    assert launch(run_rank, SftOptions(**said, zero=1), ranks=2) == [1, 1]
    assert updates(tmp_path / "run") == [1, 2, 3] and not (tmp_path / "run" / "model.safetensors").exists()


def test_lines_that_the_disk_has_no_room_for_are_written_later(straight, chats, tmp_path, monkeypatch, capsys):
    plain, calls = RunDirectory.append, []

    def append(run: RunDirectory, name: str, record: dict) -> None:
        calls.append(name)
        if 3 <= len(calls) <= 5:
            with (run.path / name).open("a") as file:
                file.write('{"half a')
            no_disk()
        plain(run, name, record)

    monkeypatch.setattr(RunDirectory, "append", append)
    assert sft(tmp_path / "run", chats) == 0
    assert capsys.readouterr().err.count("its lines wait until there is room") == 1
    assert updates(tmp_path / "run") == updates(straight) and len(evaluations(tmp_path / "run")) == 4


# ---- numbers that are none


def spoil(trainer: Trainer) -> None:
    with torch.no_grad():
        next(trainer.engine.model.parameters()).fill_(float("nan"))


def test_steps_without_finite_gradients_end_the_run_after_so_many(chats, tmp_path, monkeypatch, capsys):
    before_update(monkeypatch, 4, spoil)
    assert sft(tmp_path / "run", chats, "--max-skipped", "2") == 2
    said = capsys.readouterr().err
    assert "skipped, 1 in a row; 2 end the run" in said and "the gradient of " in said and "on rank 0" in said
    assert "2 steps in a row were skipped, and the last good checkpoint is" in said
    assert updates(tmp_path / "run") == [1, 2, 3, 4, 5]


def test_a_few_such_steps_do_not(chats, tmp_path, monkeypatch):
    kept = []

    def keep(trainer: Trainer) -> None:
        kept.append(next(trainer.engine.model.parameters()).clone())
        spoil(trainer)

    def mend(trainer: Trainer) -> None:
        with torch.no_grad():
            next(trainer.engine.model.parameters()).copy_(kept.pop())

    for step, happen in {2: keep, 3: mend, 4: keep, 5: mend}.items():
        before_update(monkeypatch, step, happen)
    assert sft(tmp_path / "run", chats, "--max-skipped", "2") == 0
    lines = [line for line in RunDirectory(tmp_path / "run").records("metrics.jsonl") if "norm" in line]
    assert [line["skipped"] for line in lines] == [False, True, False, True, False, False]


# ---- going on


@pytest.fixture
def stopped(chats, tmp_path, monkeypatch) -> Path:
    """Make a run that stopped after step 3, with a copy of the data of its own."""
    (tmp_path / "chats.jsonl").write_bytes(chats.read_bytes())
    with monkeypatch.context() as patch:
        before_update(patch, 3, lambda trainer: signal.raise_signal(signal.SIGINT))
        assert sft(tmp_path / "run", tmp_path / "chats.jsonl", "--keep-last", "2") == 130
    return tmp_path / "run"


def test_other_data_is_refused_and_the_file_is_named(straight, stopped, capsys):
    data, again = stopped.parent / "chats.jsonl", ["sft", "--config", str(stopped / "run.json"), "--resume"]
    content = data.read_text()
    data.write_text(content.replace("cat", "cow"))
    assert main(again) == 2 and f"{data} has changed since the run in {stopped} began" in capsys.readouterr().err
    data.unlink()
    assert main(again) == 2 and f"{data} cannot be read, and the run in" in capsys.readouterr().err
    other = data.with_name("others.jsonl")
    other.write_text(content)
    assert main([*again, "--data", str(other)]) == 2 and "began with chats.jsonl" in capsys.readouterr().err
    data.write_text(content)
    prepared = Path(json.loads((stopped / "run.json").read_text())["provenance"]["prepared"])
    damage(prepared / "train" / "tokens.npy")
    assert main(again) == 2
    said = capsys.readouterr().err
    assert str(prepared / "train" / "tokens.npy") in said and f"remove {prepared}" in said
    assert named(stopped) == 3 and updates(stopped) == [1, 2, 3]
    shutil.rmtree(prepared)
    assert main(again) == 0 and same(straight, stopped)


def test_a_damaged_checkpoint_is_passed_over_and_both_are_named(straight, stopped, capsys):
    folder = stopped / "checkpoints"
    damage(folder / "step-00000003" / "rank-00000.safetensors")
    assert main(["sft", "--config", str(stopped / "run.json"), "--resume"]) == 0
    said = capsys.readouterr()
    assert f"{folder / 'step-00000003'} is damaged" in said.err
    assert f"going on from {folder / 'step-00000002'} in place of {folder / 'step-00000003'}" in said.err
    assert same(straight, stopped) and updates(stopped) == updates(straight)


def test_where_no_checkpoint_is_whole_that_is_said(stopped, capsys):
    for path in (stopped / "checkpoints").glob("step-*/*.safetensors"):
        damage(path)
    assert main(["sft", "--config", str(stopped / "run.json"), "--resume"]) == 2
    assert f"no checkpoint in {stopped / 'checkpoints'} is whole" in capsys.readouterr().err


def test_what_torchrun_starts_again_begins_anew_or_goes_on(straight, chats, tmp_path, monkeypatch, capsys):
    def crash(trainer: Trainer) -> None:
        raise RuntimeError("a crash")

    def run(*, crash_at: int) -> list[int]:
        """Make the run up to the update that crashes; return the first step that it made."""
        made: list[int] = []
        with monkeypatch.context() as patch:
            before_update(patch, crash_at, crash)
            for step in range(1, crash_at):
                before_update(patch, step, lambda trainer: made.append(trainer.engine.step + 1))
            assert sft(tmp_path / "run", chats) == (1 if crash_at <= STEPS else 0)
        return made[:1]

    assert run(crash_at=2) == [1]  # there is no checkpoint yet
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(crash_at=4) == [1]  # there is one of step 2 then
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["another", "command"])
        assert sft(tmp_path / "run", chats) == 2 and "already holds a run" in capsys.readouterr().err
    assert run(crash_at=STEPS + 1) == [3]
    assert same(straight, tmp_path / "run") and updates(tmp_path / "run") == updates(straight)
    assert evaluations(tmp_path / "run") == evaluations(straight)


def test_checkpoints_that_are_kept_and_those_written_in_the_background(straight, chats, tmp_path):
    more = ["--save-every", "1", "--keep-last", "2", "--keep-every", "3"]
    assert sft(tmp_path / "one", chats, *more) == 0 and sft(tmp_path / "two", chats, *more, "--save-async") == 0
    for run in (tmp_path / "one", tmp_path / "two"):
        there = {path.name for path in (run / "checkpoints").glob("step-*")}
        assert there == {f"step-{step:08d}" for step in {3, 5, 6, named(run, "best")}}
        assert same(straight, run)


# ---- kill -9

# whom to kill is looked up there: torchrun tells nobody which processes its ranks are
on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/proc, where ranks are found, is Linux's")


@on_linux
def test_kill_9_of_one_rank_and_of_all_leaves_the_run_as_it_was(chats, tmp_path):
    said = ["--steps", "12", "--micro-batch", "1", "--lr", "1e-3", "--dtype", "fp64", "--eval-every", "10"]
    assert sft(tmp_path / "calm", chats, *said) == 0
    calm = survive.Run(chats, tmp_path / "calm", "fp64", "alone", steps=12)
    run = survive.Run(chats, tmp_path / "run", "fp64", "zero 1", steps=12)
    chance = random.Random(0)
    try:
        run.start()
        assert survive.hit(run, survive.Kill(step=4, saving=True, everyone=False), chance)
        assert survive.hit(run, survive.Kill(step=7, saving=False, everyone=True), chance)
        run.layout = "tp 2"
        run.start()
        run.wait()
    finally:
        run.end()
    survive.compare(run, calm, exact=False)


@on_linux
def test_torchrun_hands_sigterm_on_to_its_ranks(chats, tmp_path):
    run = survive.Run(chats, tmp_path / "run", "fp32", "dp 2", steps=5000)
    try:
        run.start()
        survive.until(lambda: survive.run_step(run) > 1, "two steps")
        run.process.terminate()
        run.process.wait(60)
        time.sleep(0.1)
        assert named(run.out) == survive.run_step(run) and "saved in" in run.log.read_text()
    finally:
        run.end()
