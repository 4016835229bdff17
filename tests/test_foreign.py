"""Somebody else's model, fine-tuned: what stays as it was, what is learnt, and what is written beside it."""

import json
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


def test_any_layout_reads_it_slice_by_slice_and_learns_the_same(chats, tmp_path):
    model = foreign(tmp_path, TEMPLATES["chatml"])
    alone = tune(model, chats, tmp_path / "alone", "--lora-rank", "2", "--lora-dropout", "0.1")
    layout = ["--pp", "2", "--tp", "2", "--micro-batch", "2"]
    cut = tune(model, chats, tmp_path / "cut", "--lora-rank", "2", "--lora-dropout", "0.1", *layout)
    assert alone.keys() == cut.keys()
    assert all((alone[name] - cut[name]).abs().max() <= 1e-10 for name in alone)
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["sft"]["lora_rank"] == 2
