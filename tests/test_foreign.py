"""Somebody else's model, fine-tuned: what stays as it was, what is learnt, and what is written beside it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_jinja import TEMPLATES, write_tokenizer
from test_sft import chats as chats

from minispeed.__main__ import main
from minispeed.chat.chat_model import ChatModel
from minispeed.chat.tokenizer import ChatTokenizer
from minispeed.model import hf
from minispeed.model.adapter import load_adapter
from minispeed.model.gpt import GPT
from minispeed.model.merge import merged
from minispeed.model.presets import preset

pytest.importorskip("transformers")

SHAPE = dict(num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, hidden_dim=24, max_positions=128)


def foreign(folder: Path, template: str | None) -> Path:
    """Write a small Llama as HuggingFace would, with a chat template or without."""
    size = ChatTokenizer.load(write_tokenizer(folder / "tokenizer", template), ()).size
    model = GPT(preset("llama-3.2-1b", vocab_size=size, **SHAPE))
    hf.save(folder / "model", model.config, dict(model.named_parameters()))
    for path in (folder / "tokenizer").iterdir():
        path.rename(folder / "model" / path.name)
    return folder / "model"


def tune(model: Path, chats: Path, out: Path, *more: str, lr: str = "0.01") -> dict[str, torch.Tensor]:
    words = [
        "sft",
        "--model",
        str(model),
        "--data",
        str(chats),
        "--out",
        str(out),
        "--cache",
        str(out.parent / "cache"),
    ]
    words += ["--steps", "3", "--seq", "64", "--batch", "4", "--lr", lr, "--dtype", "fp64", "--score", "0"]
    assert main([*words, "--warmup", "1", "--threads", "1", *more]) == 0
    return load_file(out / "model.safetensors")


def test_with_lora_all_but_the_targets_stays_and_the_adapters_lie_beside_it(chats, tmp_path):
    model = foreign(tmp_path, TEMPLATES["chatml"])
    before = {name: p.detach().double() for name, p in hf.load(model).named_parameters()}
    after = tune(model, chats, tmp_path / "run", "--lora-rank", "2", "--lora-targets", "attention.*", "mlp.down")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"blocks.{i}.{leaf}.weight" for i in (0, 1) for leaf in ("attention.qkv", "attention.out", "mlp.down")
    }
    assert all(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-9) <= 2 for name in changed)
    lora, adapters = load_adapter(tmp_path / "run" / "adapter")
    again = merged({**before, **adapters}, lora)
    assert all(torch.allclose(again[name], after[name], rtol=0, atol=1e-12) for name in after)


def test_the_rate_of_the_adapters_is_their_own(chats, tmp_path):
    model = foreign(tmp_path, TEMPLATES["chatml"])
    plain = tune(model, chats, tmp_path / "plain", "--lora-rank", "2")
    same = tune(model, chats, tmp_path / "same", "--lora-rank", "2", "--lora-lr", "0.01", lr="0.5")
    other = tune(model, chats, tmp_path / "other", "--lora-rank", "2", "--lora-lr", "0.02")
    assert all(torch.allclose(plain[name], same[name], rtol=0, atol=1e-12) for name in plain)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


def test_tokens_that_are_new_to_the_model_are_learnt_under_lora_too(chats, tmp_path, capsys):
    model = foreign(tmp_path, None)
    known = hf.read_config(model).vocab_size
    after = tune(model, chats, tmp_path / "run", "--lora-rank", "2")
    assert (
        "tokens of our template" in (said := capsys.readouterr().out) and "embedding and head are trained too" in said
    )
    new = after["embed.tokens.weight"][known:]
    assert len(new) == 6 and len({tuple(row.tolist()) for row in new}) > 1  # they began alike
    chat = ChatModel.load(tmp_path / "run")
    assert chat.template.stop_id(chat.tokenizer) >= known
    lora, learnt = load_adapter(tmp_path / "run" / "adapter")
    assert f"model.resize_token_embeddings({known + 6})" in said
    assert torch.equal(learnt["embed.tokens.weight"], after["embed.tokens.weight"])
    base = {name: p.detach().double() for name, p in hf.load(model).named_parameters()}
    again = merged({**base, **{name: x for name, x in learnt.items() if name in base or ".lora." in name}}, lora)
    assert all(torch.allclose(again[name], after[name], rtol=0, atol=1e-12) for name in after)


def test_any_layout_reads_it_slice_by_slice_and_learns_the_same(chats, tmp_path):
    model = foreign(tmp_path, TEMPLATES["chatml"])
    alone = tune(model, chats, tmp_path / "alone", "--lora-rank", "2", "--lora-dropout", "0.1")
    layout = ["--pp", "2", "--tp", "2", "--micro-batch", "2"]
    cut = tune(model, chats, tmp_path / "cut", "--lora-rank", "2", "--lora-dropout", "0.1", *layout)
    assert alone.keys() == cut.keys()
    assert all((alone[name] - cut[name]).abs().max() <= 1e-10 for name in alone)
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["sft"]["lora_rank"] == 2


@pytest.fixture(scope="module")
def tuned(chats, tmp_path_factory):
    """A run with adapters, of 3 steps."""
    folder = tmp_path_factory.mktemp("tuned")
    tune(foreign(folder, TEMPLATES["chatml"]), chats, folder / "run", "--lora-rank", "2", "--lora-dropout", "0.1")
    return folder


def resume(tuned: Path, out: Path, chats: Path, *more: str) -> int:
    if not out.exists():
        shutil.copytree(tuned / "run", out)
    words = [
        "sft",
        "--model",
        str(tuned / "model"),
        "--data",
        str(chats),
        "--out",
        str(out),
        "--resume",
        "--threads",
        "1",
    ]
    return main([*words, "--cache", str(tuned / "cache"), "--batch", "4", "--score", "0", *more])


def test_a_resumed_run_keeps_the_adapters_it_began_with(tuned, chats, tmp_path):
    assert resume(tuned, tmp_path / "plain", chats, "--steps", "5") == 0
    told = json.loads((tmp_path / "plain" / "run.json").read_text())["sft"]
    assert told["lora_rank"] == 2 and told["lora_dropout"] == 0.1 and told["steps"] == 5
    assert resume(tuned, tmp_path / "again", chats, "--steps", "5", "--lora-rank", "2", "--lora-dropout", "0.1") == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora-rank", "4"], "--lora-rank is 4, and the run in"),
        (["--lora-alpha", "9"], "--lora-alpha is 9.0, and the run in"),
        (["--lora-targets", "mlp.*"], "--lora-targets is ['mlp.*'], and the run in"),
        (["--template", "ours"], "--template is ours, and the run in"),
    ],
)
def test_other_adapters_or_another_template_are_refused_and_the_run_stays(tuned, chats, tmp_path, more, said, capsys):
    shutil.copytree(tuned / "run", tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    assert resume(tuned, tmp_path / "run", chats, "--steps", "5", *more) == 2
    assert said in capsys.readouterr().err and (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_run_goes_on_without_its_pointer_and_mends_it(tuned, chats, tmp_path, capsys):
    shutil.copytree(tuned / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "last").unlink()
    assert resume(tuned, tmp_path / "run", chats, "--steps", "3") == 0
    assert "is missing or empty" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "last").read_text().strip() == "step-00000003"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora-lr", "0.1"], "--lora-lr is for adapters, and --lora-rank is 0"),
        (["--lora-rank", "2", "--lora-lr", "0.1", "--lr", "0"], "the schedule is of --lr, which is 0"),
        (["--deep", "dwa"], "--deep dwa is for a new model"),
        (["--tokenizer", "x.json"], "--tokenizer is for a new model"),
        (["--vocab-size", "300"], "--vocab-size 300 is for a tokenizer that is learnt"),
        (["--lora-rank", "2", "--lora-targets", "attn"], "matches no Linear"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(tuned, chats, tmp_path, more, said, capsys):
    words = [
        "sft",
        "--model",
        str(tuned / "model"),
        "--data",
        str(chats),
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "3",
    ]
    assert main([*words, "--cache", str(tuned / "cache"), "--seq", "64", *more]) == 2
    assert said in capsys.readouterr().err
