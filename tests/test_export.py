"""Laws of an export: `transformers` reads the same ids, says the same tokens, and stops where we do."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from test_jinja import TEMPLATES, conversations, ordinary, rendered, write_tokenizer

from minispeed import checkpoint
from minispeed.chat.chat_model import ChatModel
from minispeed.chat.conversation import Conversation, Turn
from minispeed.chat.export import export, write_export
from minispeed.chat.jinja import JinjaTemplate
from minispeed.chat.pack import Packing
from minispeed.chat.prepare import encode_documents
from minispeed.chat.template import Template
from minispeed.chat.tokenizer import SPECIALS, ChatTokenizer
from minispeed.checkpoint import Piece
from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.model import hf
from minispeed.model.generate import generate
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset

transformers = pytest.importorskip("transformers")

TOKENIZER = ChatTokenizer.train(["the cat sat on the mat\n\n 猫 <|end|>"] * 9, 300)
SHAPES = {  # a name, as the presets', and what is other: one of each architecture that is written
    "gpt2": dict(num_layers=2, model_dim=32, num_heads=4, num_kv_heads=4, head_dim=8, hidden_dim=48),
    "llama-3.2-1b": dict(num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48),
    "qwen2.5-0.5b": dict(num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48),
}


@dataclass
class Asked:
    run: Path
    out: Path
    dtype: str | None = None
    checkpoint: str | None = None


def chat_of(name: str, *, seed: int = 0, tokenizer=TOKENIZER, template=Template()) -> ChatModel:
    config = preset(name, vocab_size=tokenizer.size, max_positions=256, **SHAPES[name])
    return ChatModel(GPT(config, seed=seed).double(), tokenizer, template)


def loaded(folder: Path):
    """The model and the tokenizer that `transformers` makes of a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def continued(model, ids: list[int], **how) -> list[int]:
    """What `transformers` says after ids, told nothing of when to stop but the most tokens."""
    mask = torch.ones(1, len(ids), dtype=torch.long)
    return model.generate(torch.tensor([ids]), attention_mask=mask, **how)[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    write_export(chat_of("gpt2"), out)
    return transformers.AutoTokenizer.from_pretrained(out)


@given(turns=conversations(ordinary, ordinary))
def test_our_template_in_jinja_makes_our_ids(exported, turns):
    [row] = Template().encode_rows([Conversation(turns)], TOKENIZER)[0]
    assert rendered(exported, turns) == row.ids
    assert rendered(exported, turns, add_generation_prompt=True) == Template().prompt(turns, TOKENIZER)


@given(turns=conversations(st.text(max_size=6), st.text(max_size=6)))
def test_text_of_any_kind_is_written_as_it_is(exported, turns):
    assert rendered(exported, turns) == Template().encode(Conversation(turns), TOKENIZER).ids


def test_a_special_token_that_is_typed_is_text_here_and_that_token_there(exported):
    turns = [Turn("user", "the <|end|>")]
    end = TOKENIZER.special["<|end|>"]
    assert Template().prompt(turns, TOKENIZER).count(end) == 1
    assert rendered(exported, turns, add_generation_prompt=True).count(end) == 2
    sanitized = rendered(exported, turns, add_generation_prompt=True, sanitize_control_tokens=True)
    assert sanitized.count(end) == 1


def test_a_role_that_the_template_has_not_is_refused(exported):
    with pytest.raises(Exception, match="there is no role tool"):
        rendered(exported, [Turn("tool", "x")])


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_model_says_the_same_in_transformers(tmp_path, name):
    chat = chat_of(name)
    write_export(chat, tmp_path / "out")
    model, tokenizer = loaded(tmp_path / "out")
    assert model.dtype == torch.float64
    for question in ("the cat", "sat on 7 猫", ""):
        turns = [Turn("user", question)]
        ids = rendered(tokenizer, turns, add_generation_prompt=True)
        assert ids == chat.template.prompt(turns, chat.tokenizer)
        [answer] = generate(chat.model, [ids], stop=[chat.template.stop_id(chat.tokenizer)], max_new=12)
        said = continued(model, ids, max_new_tokens=12)
        assert said == answer.tokens + [chat.template.stop_id(chat.tokenizer)] * answer.stopped


def learn(chat: ChatModel, conversations: list[Conversation], steps: int) -> None:
    """Train on all conversations at once."""
    packing = Packing(encode_documents(conversations, chat.tokenizer, chat.template), seq=64, batch=8)
    rows = packing.batch(0, 0)
    tokens, labels, positions, documents = (torch.from_numpy(column) for column in rows[:4])
    optimizer = torch.optim.AdamW(chat.model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        chat.model(tokens, labels, positions=positions, documents=documents).sum().backward()
        optimizer.step()


def test_a_trained_model_stops_unasked(tmp_path):
    chat = chat_of("llama-3.2-1b", seed=1)
    learn(
        chat,
        [Conversation((Turn("user", q), Turn("assistant", a))) for q, a in {"cat": "sat", "on": "mat"}.items()],
        40,
    )
    chat.save(tmp_path / "run")
    assert export(Asked(tmp_path / "run", tmp_path / "out")) == 0
    model, tokenizer = loaded(tmp_path / "out")
    for question, answer in {"cat": "sat", "on": "mat"}.items():
        ids = rendered(tokenizer, [Turn("user", question)], add_generation_prompt=True)
        said = continued(model, ids, max_new_tokens=50)
        assert said == [*TOKENIZER.encode(answer), Template().stop_id(TOKENIZER)]
        assert tokenizer.decode(said, skip_special_tokens=True) == answer


def test_another_checkpoints_template_goes_out_as_it_came(tmp_path):
    folder = write_tokenizer(tmp_path / "in", TEMPLATES["chatml"])
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": [290, 289], "temperature": 0.6, "do_sample": true}'
    )
    config = preset("qwen2.5-0.5b", vocab_size=300, max_positions=256, **SHAPES["qwen2.5-0.5b"])
    hf.save(tmp_path / "model", config, dict(GPT(config).named_parameters()))
    for path in (tmp_path / "model").iterdir():
        path.rename(folder / path.name)
    ChatModel.load(folder).save(tmp_path / "run")
    export(Asked(tmp_path / "run", tmp_path / "out", dtype="bf16"))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    told = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert told["eos_token_id"] == [289, 290] and told["temperature"] == 0.6  # what ends an answer is first
    model, tokenizer = loaded(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == [289, 290]
    turns = [Turn("user", "the cat")]
    template, ours = JinjaTemplate.read(tmp_path / "out"), ChatTokenizer.load(tmp_path / "out", ())
    assert template.prompt(turns, ours) == rendered(tokenizer, turns, add_generation_prompt=True)
    again = ChatModel.load(tmp_path / "out")
    assert again.notes == () and again.model.config.vocab_size == 300


def test_our_tokens_added_to_a_checkpoint_go_out_too(tmp_path):
    folder = write_tokenizer(tmp_path / "in", None)
    tokenizer = ChatTokenizer.load(folder, SPECIALS)
    write_export(chat_of("gpt2", tokenizer=tokenizer), tmp_path / "out")
    model, theirs = loaded(tmp_path / "out")
    turns = (Turn("user", "the cat"), Turn("assistant", "sat"))
    assert rendered(theirs, turns) == Template().encode(Conversation(turns), tokenizer).ids
    assert model.generation_config.eos_token_id == tokenizer.special["<|end|>"]


@pytest.mark.parametrize("pointer", ["last", "best"])
def test_a_checkpoints_masters_go_out(tmp_path, pointer):
    chat = chat_of("llama-3.2-1b")
    chat.save(tmp_path / "run")
    other = {name: torch.randn_like(p) for name, p in chat.model.named_parameters()}
    pieces = [Piece(f"parameters/{n}", tuple(x.shape), Interval(0, x.numel()), x.flatten()) for n, x in other.items()]
    checkpoint.save(tmp_path / "run" / "checkpoints" / "step-00000007", pieces, {"step": 7})
    (tmp_path / "run" / "checkpoints" / pointer).write_text("step-00000007\n")
    export(Asked(tmp_path / "run", tmp_path / "out", "fp32", pointer))
    model = hf.load(tmp_path / "out")
    for name, p in model.named_parameters():
        assert torch.equal(p, other[name].to(torch.float32))
    absent = {"last": "best", "best": "last"}[pointer]
    with pytest.raises(UserError, match=f"has no {absent} checkpoint"):
        export(Asked(tmp_path / "run", tmp_path / "other", None, absent))


def test_what_is_there_stays_and_what_fails_leaves_nothing(tmp_path):
    chat = chat_of("gpt2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="mine exists and is left as it is"):
        write_export(chat, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="there is no dtype 'int8'"):
        write_export(chat, tmp_path / "out", dtype="int8")
    odd = GPT(preset("nano", norm="rmsnorm", deep="x0", vocab_size=TOKENIZER.size, max_positions=64))
    with pytest.raises(UserError, match="has deep 'x0'"):
        write_export(ChatModel(odd, TOKENIZER, Template()), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    write_export(chat, tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]
