"""Laws of talking: what is said goes through the template, commands are commands, every end is polite."""

import io
import sys

import pytest
import torch

from minispeed.__main__ import main
from minispeed.chat import converse as converse_module
from minispeed.chat.chat_model import ChatModel
from minispeed.chat.conversation import Conversation, Turn
from minispeed.chat.converse import RESERVE, shorten
from minispeed.chat.template import Template
from minispeed.chat.tokenizer import ChatTokenizer
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Save a model that was never trained."""
    tokenizer = ChatTokenizer.train(["hello there"] * 3, 270)
    chat = ChatModel(GPT(preset("nano", vocab_size=tokenizer.size, max_positions=96)), tokenizer, Template())
    path = tmp_path_factory.mktemp("run")
    chat.save(path)
    return path


def talk(run, monkeypatch, capsys, *lines: str) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    assert main(["chat", str(run), "--max-new", "4"]) == 0
    return capsys.readouterr().out


def test_a_prompt_is_answered_and_the_command_ends(run, capsys):
    assert main(["chat", str(run), "--prompt", "hello", "--max-new", "5"]) == 0
    first = capsys.readouterr().out
    assert main(["chat", str(run), "--prompt", "hello", "--max-new", "5"]) == 0
    assert capsys.readouterr().out == first and first.strip()


def test_drawn_answers_follow_the_seed(run, capsys):
    def drawn(seed: int) -> str:
        words = ["--temperature", "1.5", "--seed", str(seed), "--max-new", "12"]
        assert main(["chat", str(run), "--prompt", "hello", *words]) == 0
        return capsys.readouterr().out

    assert drawn(1) == drawn(1) != drawn(2)


def test_the_conversation_is_kept_until_reset(run, monkeypatch, capsys):
    seen = []
    plain = converse_module.reply

    def watched(chat, turns, *more):
        seen.append([turn.text for turn in turns if turn.role == "user"])
        return plain(chat, turns, *more)

    monkeypatch.setattr(converse_module, "reply", watched)
    said = talk(run, monkeypatch, capsys, "one", "", "two", "/reset", "three", "/what", "/quit", "never read")
    assert seen == [["one"], ["one", "two"], ["three"]]
    assert "(forgotten)" in said and "there is no command /what" in said


def test_the_end_of_input_is_polite(run, monkeypatch, capsys):
    assert "Traceback" not in talk(run, monkeypatch, capsys, "one")


def test_ctrl_c_ends_the_answer_and_at_the_prompt_the_conversation(run, monkeypatch, capsys):
    def interrupted(*more):
        yield "hel"
        raise KeyboardInterrupt

    monkeypatch.setattr(converse_module, "reply", interrupted)
    assert "hel (interrupted)" in talk(run, monkeypatch, capsys, "one")

    def pressed(prompt=""):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", pressed)
    assert main(["chat", str(run)]) == 0


def test_a_long_conversation_forgets_its_oldest_exchanges(run, capsys):
    chat = ChatModel.load(run)
    turns = [Turn("system", "be brief")]
    for number in range(9):
        turns += [Turn("user", f"hello {number}"), Turn("assistant", "there")]
    turns.append(Turn("user", "last"))
    shorten(chat, turns)
    assert turns[0].role == "system" and turns[1].role == "user" and turns[-1].text == "last"
    assert len(chat.template.prompt(turns, chat.tokenizer)) + RESERVE <= 96
    assert "exchanges are forgotten" in capsys.readouterr().out


def test_a_prompt_longer_than_the_model_reads_is_a_sentence(run, monkeypatch, capsys):
    assert main(["chat", str(run), "--prompt", "x " * 300]) == 2
    assert "the model reads at most 96" in capsys.readouterr().err
    assert "the model reads at most 96" in talk(run, monkeypatch, capsys, "x " * 300, "hello")


def test_what_is_sent_is_what_was_trained_on(run):
    chat = ChatModel.load(run)
    turns = (Turn("user", "hi"), Turn("assistant", "there"))
    trained = chat.template.encode(Conversation(turns), chat.tokenizer)
    prompt = chat.template.prompt(turns[:1], chat.tokenizer)
    assert trained.ids[: len(prompt)] == prompt and not any(trained.supervised[: len(prompt)])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "template.json"])
def test_a_run_with_a_file_missing_or_damaged_is_named(run, tmp_path, name, capsys):
    for path in run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(b"{not whole")
    assert main(["chat", str(tmp_path), "--prompt", "x"]) == 2
    assert name in capsys.readouterr().err
    (tmp_path / name).unlink()
    assert main(["chat", str(tmp_path), "--prompt", "x"]) == 2
    assert f"holds no {name}" in capsys.readouterr().err


def test_weights_of_another_shape_are_named(run, tmp_path, capsys):
    for path in run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"hidden_dim": 384', '"hidden_dim": 380'))
    assert main(["chat", str(tmp_path), "--prompt", "x"]) == 2
    assert "gate.weight should be (380, 128), found (384, 128)" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(config.replace('"vocab_size": ', '"vocab_size": 1'))
    assert main(["chat", str(tmp_path), "--prompt", "x"]) == 2
    (tmp_path / "config.json").write_text(config.replace('"vocab_size": 2', '"vocab_size": '))
    assert main(["chat", str(tmp_path), "--prompt", "x"]) == 2
    assert "the tokenizer has" in capsys.readouterr().err


def test_a_model_saved_and_loaded_is_the_same(run):
    tokens = torch.tensor([[1, 2, 3]])
    chat = ChatModel.load(run)
    again = ChatModel.load(run, attention="reference")
    assert torch.allclose(chat.model.logits(tokens), again.model.logits(tokens), atol=1e-5)
    assert again.model.config.attention == "reference"
