"""Laws of a whole run: the same seed is the same weights, an interrupted run goes on, what is said is what was done."""

import json
import math
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minispeed.__main__ import main
from minispeed.chat import chat_model
from minispeed.chat.chat_model import ChatModel
from minispeed.chat.evaluate import bytes_of_tokens, evaluate_with, measure_loss
from minispeed.chat.pack import Packing
from minispeed.chat.prepare import encode_documents
from minispeed.chat.prepared import Prepared
from minispeed.chat.run import RunDirectory
from minispeed.chat.trainer import Trainer
from minispeed.chrome import read_trace

WORDS = "red green blue seven eight nine cat dog bird tree".split()


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Write 60 short conversations whose answer repeats the question's last word."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    lines = []
    for number in range(60):
        word = WORDS[number % 10]
        messages = [{"role": "user", "content": f"{WORDS[number // 10]} {number} say {word}"}]
        messages.append({"role": "assistant", "content": f"{word}!"})
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines))
    return path


def sft(out: Path, chats: Path, *more: str) -> int:
    """Train nano for 6 steps, fp32, one thread, in the cache of this test."""
    words = ["sft", "--model", "nano", "--data", str(chats), "--out", str(out), "--cache", str(chats.parent / "cache")]
    words += [
        "--seq",
        "64",
        "--batch",
        "4",
        "--vocab-size",
        "300",
        "--warmup",
        "2",
        "--dtype",
        "fp32",
        "--threads",
        "1",
    ]
    words += [
        "--score",
        "2",
        "--max-new",
        "8",
        *(more if "--steps" in more or "--minutes" in more else ["--steps", "6", *more]),
    ]
    return main(words)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(run: Path) -> list[dict]:
    return [record for record in RunDirectory(run).records("metrics.jsonl") if "norm" in record]


def interrupt_after(monkeypatch, step: int) -> None:
    """Press ctrl-C during a step."""
    plain = Trainer.update

    def update(trainer: Trainer) -> None:
        plain(trainer)
        if trainer.engine.step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "update", update)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, chats) -> Path:
    """Make one undisturbed run that others are compared with."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert sft(out, chats) == 0
    return out


def test_a_run_leaves_all_that_it_promises(straight, chats):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "template.json", "run.json", "metrics.jsonl"):
        assert (straight / name).exists(), name
    content = json.loads((straight / "run.json").read_text())
    assert content["sft"]["dtype"] == "fp32" and content["sft"]["steps"] == 6 and content["sft"]["lr"] == 0.25 / 128
    assert content["provenance"]["versions"]["torch"] == torch.__version__ and content["provenance"]["data"]
    steps = metrics(straight)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert all(record["tasks"].keys() == {"chats"} and math.isfinite(record["loss"]) for record in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert ChatModel.load(straight).model.config.vocab_size == ChatModel.load(straight).tokenizer.size


def test_the_same_seed_gives_the_same_bits_and_another_does_not(straight, chats, tmp_path):
    assert main(["sft", "--config", str(straight / "run.json"), "--out", str(tmp_path / "again")]) == 0
    assert same(straight, tmp_path / "again")
    assert sft(tmp_path / "other", chats, "--seed", "1") == 0
    assert not same(straight, tmp_path / "other")


def test_a_run_that_was_lost_before_its_first_checkpoint_begins_anew(straight, chats, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert sft(tmp_path / "run", chats) == 2 and "already holds a run" in capsys.readouterr().err
    (tmp_path / "run" / "model.safetensors").unlink()
    assert sft(tmp_path / "run", chats, "--resume") == 2 and "the command without --resume" in capsys.readouterr().err
    assert sft(tmp_path / "run", chats) == 0
    assert same(straight, tmp_path / "run") and len(metrics(tmp_path / "run")) == 6


def test_an_interrupted_run_goes_on_bit_for_bit(straight, chats, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert sft(tmp_path / "run", chats, "--eval-every", "2") == 130
    said = capsys.readouterr().out
    assert "stopped at step 3 of 6" in said and f"--config {tmp_path / 'run' / 'run.json'} --resume" in said
    assert main(["chat", str(tmp_path / "run"), "--prompt", "say cat", "--max-new", "2"]) == 0
    assert main(["sft", "--config", str(tmp_path / "run" / "run.json"), "--resume"]) == 0
    assert same(straight, tmp_path / "run")
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    folder = tmp_path / "run" / "checkpoints"
    assert {(folder / pointer).read_text().strip() for pointer in ("last", "best")} == {"step-00000006"}
    assert {path.name for path in folder.glob("step-*")} == {"step-00000006"}


def test_the_same_command_with_resume_keeps_what_the_run_had_chosen(chats, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert sft(tmp_path / "run", chats, "--minutes", "0.05") == 130
    assert sft(tmp_path / "run", chats, "--minutes", "0.05", "--resume") == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["sft"]["dtype"] == "fp32"


def test_minutes_become_a_number_of_steps_that_the_run_can_be_repeated_with(chats, tmp_path, capsys):
    assert sft(tmp_path / "timed", chats, "--minutes", "0.05") == 0
    told = json.loads((tmp_path / "timed" / "run.json").read_text())["sft"]
    num_made = len(metrics(tmp_path / "timed"))
    assert told["minutes"] is None
    # a machine that became slower meanwhile ends before, and says so
    late = f"the time is over at step {num_made} of {told['steps']}" in capsys.readouterr().out
    assert num_made < told["steps"] if late else num_made == told["steps"]


def test_micro_batches_leave_the_losses_alone(straight, chats, tmp_path):
    assert sft(tmp_path / "cut", chats, "--micro-batch", "1") == 0
    for one, other in zip(metrics(straight), metrics(tmp_path / "cut"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_another_run_is_never_overwritten(straight, chats, capsys):
    before = weights(straight)
    assert sft(straight, chats) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(straight).items())


def test_a_dry_run_writes_nothing(chats, tmp_path, capsys):
    assert sft(tmp_path / "dry", chats, "--dry-run") == 0
    assert "stopped before step 1 of 6" in capsys.readouterr().out and not (tmp_path / "dry").exists()


def test_a_run_goes_on_from_a_run(straight, chats, tmp_path, capsys):
    assert sft(tmp_path / "second", chats, "--model", str(straight)) == 2  # --model is there twice
    words = ["sft", "--model", str(straight), "--data", str(chats), "--out", str(tmp_path / "second"), "--steps", "2"]
    words += [
        "--cache",
        str(chats.parent / "cache"),
        "--seq",
        "64",
        "--threads",
        "1",
        "--dtype",
        "fp32",
        "--score",
        "1",
    ]
    assert main(words) == 0
    assert "--lr 2e-05: a trained model is moved gently" in capsys.readouterr().out
    assert metrics(tmp_path / "second")[0]["loss"] < metrics(straight)[0]["loss"]
    assert (tmp_path / "second" / "tokenizer.json").read_text() == (straight / "tokenizer.json").read_text()


def test_a_full_disk_is_a_sentence_and_leaves_the_checkpoint_before(chats, tmp_path, monkeypatch, capsys):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chat_model, "save_file", full)
    assert sft(tmp_path / "run", chats) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "model.safetensors" in said and "Traceback" not in said
    assert "not all of the run is saved; the last good checkpoint is" in said
    assert RunDirectory(tmp_path / "run").load_checkpoint().state["step"] == 6
    assert not list((tmp_path / "run").glob(".*"))


def test_eval_scores_what_was_held_out_and_any_file(straight, chats, capsys):
    assert main(["eval", str(straight), "--json", "--score", "0", "--max-new", "4"]) == 0
    own = json.loads(capsys.readouterr().out)
    assert own["tasks"]["chats"]["count"] == len(held_out(straight).eval) and own["perplexity"] > 1
    assert (
        main(["eval", str(straight), "--data", str(chats), "--max-new", "4", "--score", "3", "--pattern", "[a-z]"]) == 0
    )
    table = capsys.readouterr().out
    assert "perplexity" in table and "of the answers hold '[a-z]'" in table


def held_out(run: Path) -> Prepared:
    return Prepared.open(json.loads((run / "run.json").read_text())["provenance"]["prepared"])


def test_measured_loss_is_the_sum_over_conversations_alone(straight):
    chat = ChatModel.load(straight)
    conversations = held_out(straight).eval_conversations()
    documents = encode_documents(conversations, chat.tokenizer, chat.template)
    sizes = bytes_of_tokens(chat)
    together = measure_loss(evaluate_with(chat.model), Packing(documents, seq=64, batch=2), sizes, micro_batch=1)[
        "chats"
    ]
    nats = tokens = 0.0
    with torch.no_grad():
        for conversation in conversations:
            ids, supervised, _ = chat.template.encode(conversation, chat.tokenizer)
            labels = torch.tensor([i if learnt else -100 for i, learnt in zip(ids, supervised)])[None]
            nats += chat.model(torch.tensor([ids[:-1]]), labels[:, 1:]).sum().item()
            tokens += sum(supervised)
    assert together.nats == pytest.approx(nats, rel=1e-5) and together.tokens == tokens
    assert together.bytes == sum(len(c.turns[-1].text.encode()) for c in conversations)


def test_a_mixture_takes_its_weights(chats, tmp_path):
    second = tmp_path / "second.jsonl"
    second.write_text(chats.read_text().replace("say", "tell"))
    words = ["--data", str(second), "--weights", "1", "--weights", "0"]
    assert sft(tmp_path / "one", chats, *words) == 0
    assert all(record["tasks"].keys() == {"chats"} for record in metrics(tmp_path / "one"))
    assert sft(tmp_path / "two", chats, *words[:2]) == 0
    assert any(record["tasks"].keys() == {"chats", "second"} for record in metrics(tmp_path / "two"))


def test_a_second_interrupt_stops_at_once(chats, tmp_path, monkeypatch):
    assert threading.current_thread() is threading.main_thread()

    def hang(trainer: Trainer) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(Trainer, "update", hang)
    assert sft(tmp_path / "run", chats) == 130


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "tiniest"], "no preset is called 'tiniest'"),
        (["--model", "gpt2", "--seq", "2000"], "--seq 2000 is longer than the 1024 positions of gpt2"),
        (["--tokenizer", "nowhere.json"], "there is no file nowhere.json"),
        (["--num_train_epochs", "3"], "is --epochs"),
        (["--epochss", "3"], "no option --epochss"),
        (["--lr", "fast"], "--lr must be a number"),
        (["--seq", "4"], "context of 4 tokens is shorter than"),
        (["--resume"], "holds no checkpoint to go on from"),
        (["--steps", "3", "--minutes", "1"], "both say when to stop"),
        (["--recompute", "some"], "cannot recompute 'some'"),
    ],
)
def test_bad_input_is_one_sentence(words, message, chats, tmp_path, capsys):
    options = {"--model": "nano", "--data": str(chats), "--out": str(tmp_path / "run"), "--cache": str(tmp_path / "c")}
    given = dict(zip(words[::2], words[1::2])) if len(words) > 1 else {}
    for name, value in (options | given).items():
        words = [*words, name, value] if name not in words else words
    assert main(["sft", *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err
    assert not (tmp_path / "run" / "run.json").exists()


def test_several_files_follow_one_flag(chats, tmp_path):
    second = tmp_path / "second.jsonl"
    second.write_text(chats.read_text().replace("say", "tell"))
    words = [
        "sft",
        "--model",
        "nano",
        "--out",
        str(tmp_path / "run"),
        "--cache",
        str(tmp_path / "cache"),
        "--seq",
        "64",
    ]
    assert main([*words, "--weights", "1", "2", "--data", str(chats), str(second), "--dry-run"]) == 0


LAYOUTS = {
    "stage 0": ["--ranks", "2"],
    "stage 3": ["--dp", "2", "--zero", "3"],
    "rows": ["--sp", "2", "--sequence", "ring"],
    "depth and width": ["--pp", "2", "--tp", "2", "--pipeline-schedule", "zb_h1", "--micro-batch", "2"],
}


@pytest.mark.parametrize("words", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_is_the_same_run(words, straight, chats, tmp_path):
    assert sft(tmp_path / "two", chats, *words, "--trace", str(tmp_path / "trace.json"), "--trace-steps", "2") == 0
    rows = read_trace(tmp_path / "trace.json").rows
    assert [row.rank for row in rows] == list(range(4 if "--pp" in words else 2))
    for row in rows:  # each micro-batch once in each of two steps, and messages with somebody
        kinds = Counter(span.kind for span in row.spans)
        assert kinds["forward"] == kinds["backward"] + kinds["backward input"] == 2 * (2 if "--pp" in words else 1)
        assert kinds["reduce"] + kinds["send"] and row.memory
    one, two = metrics(straight), metrics(tmp_path / "two")
    assert len(one) == len(two)
    for alone, together in zip(one, two):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert together["num_supervised"] == alone["num_supervised"] and together["num_tokens"] == alone["num_tokens"]
    got, expected = weights(tmp_path / "two"), weights(straight)
    assert all((got[name] - expected[name]).abs().max() < 1e-3 for name in expected)


WRONG = {
    "--pp 2 x --sp 1 x --tp 1 = 2 ranks, but --ranks is 3": ["--pp", "2", "--ranks", "3"],
    "--dp 2 x --pp 1 x --sp 1 x --tp 2 = 4 ranks, but --ranks is 2": ["--dp", "2", "--tp", "2", "--ranks", "2"],
    "--micro-batch 3 does not divide 4 rows": ["--pp", "2", "--micro-batch", "3"],
    "--sequence-parallel cuts among the ranks of --tp, which is 1": ["--sequence-parallel"],
    "--pipeline-schedule zb_h1 orders a pipeline, and --pp is 1": ["--pipeline-schedule", "zb_h1"],
    "--trace-steps 6, from the second on, are not in a run of 6": ["--trace", "t.json", "--trace-steps", "6"],
}


@pytest.mark.parametrize(("message", "words"), WRONG.items(), ids=[" ".join(words) for words in WRONG.values()])
def test_a_layout_that_cannot_be_is_a_sentence(message, words, chats, tmp_path, capfd):
    assert sft(tmp_path / "run", chats, *words) == 2
    assert message in capfd.readouterr().err


def test_rows_that_do_not_divide_are_a_sentence(chats, tmp_path, capsys):
    assert sft(tmp_path / "run", chats, "--ranks", "3") == 2
    assert "--batch 4 rows do not divide over 3 replicas" in capsys.readouterr().err


def test_minutes_that_a_run_of_fixed_steps_cannot_use_are_said(chats, tmp_path, capsys):
    run = tmp_path / "run"
    assert sft(run, chats, "--steps", "2") == 0
    assert "is left out" not in capsys.readouterr().out
    assert sft(run, chats, "--resume", "--minutes", "1") == 0
    assert "--minutes 1 is left out: the run is of 2 steps" in capsys.readouterr().out


def test_a_planned_run_trains_and_its_own_configuration_plans_no_more(chats, tmp_path, capsys):
    assert sft(tmp_path / "run", chats, "--auto", "--profile", "l4", "--steps", "2") == 0
    assert "planned: one device" in capsys.readouterr().out
    effective = json.loads((tmp_path / "run" / "run.json").read_text())["sft"]
    assert effective["auto"] == [] and effective["dp"] == 1


def test_a_compression_that_goes_on_says_what_is_lost_and_a_step_for_none_is_refused(chats, tmp_path, capsys):
    words = ("--compression", "onebit", "--freeze-step", "1")
    assert sft(tmp_path / "run", chats, *words, "--steps", "2") == 0
    assert "owed is in no checkpoint" not in capsys.readouterr().out
    assert sft(tmp_path / "run", chats, *words, "--steps", "3", "--resume") == 0
    assert "owed is in no checkpoint" in capsys.readouterr().out
    assert sft(tmp_path / "other", chats, "--freeze-step", "1") == 2
    assert "--compression is none" in capsys.readouterr().err
