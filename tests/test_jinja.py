"""Laws of others' chat templates: the ids of `transformers`; answers go on from prompts; what is typed is text."""

import json
from datetime import date
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from minispeed.chat import jinja
from minispeed.chat.chat_model import ChatModel, grow
from minispeed.chat.conversation import Conversation, Turn
from minispeed.chat.jinja import JinjaTemplate
from minispeed.chat.prepare import encode_documents, prepare
from minispeed.chat.prepared import Prepared
from minispeed.chat.show import report_text
from minispeed.chat.template import Template
from minispeed.chat.templates import choose_template, load_template
from minispeed.chat.tokenizer import SPECIALS, ChatTokenizer
from minispeed.errors import UserError
from minispeed.model import hf
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset

transformers = pytest.importorskip("transformers")

ADDED = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>")
NOT_SPECIAL = ("<think>", "</think>")
TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TEMPLATES = {
    "chatml": f"{{% for m in messages %}}{TURN}{{% endfor %}}{PROMPT}",
    "headers, text trimmed": """
{{- bos_token }}
{%- for m in messages %}
    {{- '<|head|>' + m['role'] + '<|/head|>\\n\\n' + m['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
""",
    "today's date": "<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n"
    f"{{% for m in messages %}}{TURN}{{% endfor %}}{PROMPT}",
    "a system message of its own": f"""{{% for m in messages %}}
{{% if loop.first and m.role != 'system' %}}
{{{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}}}{{% endif %}}
{{% generation %}}{TURN}{{% endgeneration %}}{{% endfor %}}{PROMPT}""",
    "system and question joined": "{% for m in messages %}{{ ('\\n' if m.role == 'assistant' else '') + m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}{{ '\\n' }}{% endif %}",
    "earlier thinking dropped": f"""{{% set last = messages | length - 1 %}}{{% for m in messages %}}
{{% set text = m.content.split('</think>') %}}
{{% if m.role != 'assistant' %}}{TURN}{{% elif loop.index0 == last %}}
{{{{ '<|im_start|>assistant\\n<think>\\n' + text[:-1] | join | replace('<think>', '') | trim + '\\n</think>\\n\\n' }}}}
{{{{- text[-1].lstrip('\\n') + '<|im_end|>\\n' }}}}{{% else %}}
{{{{ '<|im_start|>assistant\\n' + text[-1].lstrip('\\n') + '<|im_end|>\\n' }}}}{{% endif %}}{{% endfor %}}{PROMPT}""",
}
NAMES = sorted(TEMPLATES)
AS_ONE = [name for name in NAMES if name != "earlier thinking dropped"]
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"


def write_tokenizer(folder: Path, source: str | None) -> Path:
    """Save a checkpoint's tokenizer as `transformers` does, with that chat template."""
    words = Tokenizer(models.BPE())
    split = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pieces = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    words.pre_tokenizer, words.decoder = pre_tokenizers.Sequence(pieces), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(["the cat sat\n\nuser assistant <|im_end|> <|eot|> <think>"] * 9, trainer)
    words.add_special_tokens(list(ADDED))
    words.add_tokens(list(NOT_SPECIAL))
    named = dict(bos_token="<|begin|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **named)
    fast.chat_template = source
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """For each template: ours, its tokenizer, and that of `transformers`."""
    loaded = {}
    for name, source in TEMPLATES.items():
        folder = write_tokenizer(tmp_path_factory.mktemp("checkpoint"), source)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        loaded[name] = JinjaTemplate.read(folder).dated(), ChatTokenizer.load(folder, ()), theirs
    return loaded


def rendered(theirs, turns, **how):
    """What `transformers` makes of turns: ids, or text where not tokenize."""
    return theirs.apply_chat_template([{"role": r, "content": t} for r, t in turns], return_dict=False, **how)


words = st.sampled_from(["the cat", "sat", "\n", "\n\n", " ", "猫", "?", "7", "é"]) | st.text(max_size=4)
specials = st.sampled_from([*ADDED, *NOT_SPECIAL, "<", "<|im_", "end|>", "|>", "<|", "e", "\U000f0000", ">"])
ordinary = st.lists(words, min_size=1, max_size=4).map("".join).map(lambda text: "a" + text)
any_text = st.lists(words | specials, min_size=1, max_size=4).map("".join)


def conversations(texts, answers):
    """System or not, then questions and answers in turn; the last question may be open."""
    system = st.lists(st.builds(Turn, st.just("system"), texts), max_size=1)
    pair = st.tuples(st.builds(Turn, st.just("user"), texts), st.builds(Turn, st.just("assistant"), answers))
    tail = st.lists(st.builds(Turn, st.just("user"), texts), max_size=1)
    pairs = st.lists(pair, min_size=1, max_size=3)
    return st.builds(lambda s, p, t: (*s, *(turn for two in p for turn in two), *t), system, pairs, tail)


@pytest.mark.parametrize("name", AS_ONE)
@given(turns=conversations(ordinary, ordinary))
def test_the_ids_are_those_of_transformers(checkpoints, name, turns):
    template, tokenizer, theirs = checkpoints[name]
    [row] = template.encode_rows([Conversation(turns)], tokenizer)[0]
    assert row.ids == rendered(theirs, turns)
    if turns[-1].role == "user":
        assert template.prompt(turns, tokenizer) == rendered(theirs, turns, add_generation_prompt=True)


@pytest.mark.parametrize("name", NAMES)
@given(turns=conversations(any_text, any_text))
def test_each_answer_goes_on_from_the_prompt_and_ends_with_the_stop_token(checkpoints, name, turns):
    template, tokenizer, _ = checkpoints[name]
    places = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    rows = template.encode_rows([Conversation(turns)], tokenizer)[0]
    assert len(places) == sum(len(row.cuts) for row in rows)
    spans = [(row, cut) for row in rows for cut in row.cuts]
    for row in rows:
        learnt = [False] * len(row.ids)
        for place, (_, cut) in [pair for pair in zip(places, spans, strict=True) if pair[1][0] is row]:
            prompt = template.prompt(turns[:place], tokenizer)
            assert row.ids[: len(prompt)] == prompt
            assert row.ids[cut - 1] == template.stop_id(tokenizer)
            assert template.stop_id(tokenizer) not in row.ids[len(prompt) : cut - 1]
            learnt[len(prompt) : cut] = [True] * (cut - len(prompt))
        assert row.supervised == learnt


@given(name=st.sampled_from(AS_ONE), turns=conversations(any_text, any_text))
def test_no_special_token_comes_from_what_is_typed_and_no_text_is_lost(checkpoints, name, turns):
    template, tokenizer, theirs = checkpoints[name]
    [row] = template.encode_rows([Conversation(turns)], tokenizer)[0]
    harmless = tuple(Turn(role, "a") for role, _ in turns)
    structure = set(tokenizer.special.values())
    expected = [i for i in rendered(theirs, harmless) if i in structure]
    assert [i for i in row.ids if i in structure] == expected
    assert tokenizer.decode(row.ids, special=True) == rendered(theirs, turns, tokenize=False)


@given(
    st.sampled_from(NAMES), st.lists(conversations(any_text, any_text) | st.just((Turn("text", "the"),)), max_size=4)
)
def test_many_at_once_on_all_cores_are_as_one_by_one(checkpoints, name, many):
    template, tokenizer, _ = checkpoints[name]
    batch = [Conversation(turns) for turns in many]
    alone = [template.encode_rows([one], tokenizer)[0] for one in batch]
    assert template.encode_rows(batch, tokenizer, workers=2) == alone


@pytest.mark.parametrize("halves", [("<|im_", "end|>"), ("a<", "|im_end|>"), ("<|im_end|", "> b")])
def test_two_texts_do_not_make_a_token_where_they_meet(checkpoints, halves):
    template, tokenizer, _ = checkpoints["system and question joined"]
    ids = template.prompt([Turn("system", halves[0]), Turn("user", halves[1])], tokenizer)
    assert tokenizer.special["<|im_end|>"] not in ids and tokenizer.decode(ids) == "".join(halves) + "\n"


@given(turns=conversations(any_text, any_text))
def test_thinking_is_a_token_in_an_answer_alone(checkpoints, turns):
    template, tokenizer, _ = checkpoints["chatml"]
    [row] = template.encode_rows([Conversation(turns)], tokenizer)[0]
    said = "\0".join(turn.text for turn in turns if turn.role == "assistant")
    thinking = tokenizer.added["<think>"]
    assert row.ids.count(thinking) == said.count("<think>")


@given(texts=st.lists(any_text, min_size=1, max_size=3))
def test_earlier_thinking_that_is_dropped_makes_a_row_of_each_answer(checkpoints, texts):
    template, tokenizer, theirs = checkpoints["earlier thinking dropped"]
    turns = tuple(turn for text in texts for turn in (Turn("user", "a"), Turn("assistant", "<think>so</think>b")))
    rows = template.encode_rows([Conversation(turns)], tokenizer)[0]
    assert [row.ids for row in rows] == [rendered(theirs, turns[: 2 * n + 2]) for n in range(len(texts))]
    for row in rows:
        learnt = [i for i, one in zip(row.ids, row.supervised) if one]
        assert tokenizer.decode(learnt, special=True) == "<think>\nso\n</think>\n\nb<|im_end|>"


@given(name=st.sampled_from(NAMES), turns=conversations(ordinary, ordinary))
def test_trained_on_all_every_token_but_the_first_is_learnt(checkpoints, name, turns):
    template, tokenizer, theirs = checkpoints[name]
    [row] = template.encode_rows([Conversation(turns)], tokenizer, train_on="all")[0]
    assert row.ids == rendered(theirs, turns) and row.supervised == [False] + [True] * (len(row.ids) - 1)


def test_a_merge_does_not_reach_from_the_prompt_into_an_answer(checkpoints):
    template, tokenizer, theirs = checkpoints["chatml"]
    turns = (Turn("user", "the"), Turn("assistant", "\ncat"))
    [row] = template.encode_rows([Conversation(turns)], tokenizer)[0]
    assert row.ids != rendered(theirs, turns)  # "\n\n" is one token there
    prompt = rendered(theirs, turns[:1], add_generation_prompt=True)
    assert row.ids[: len(prompt)] == prompt and row.supervised.index(True) == len(prompt)


def test_a_plain_text_stands_between_the_tokens_that_begin_and_end_a_sequence(checkpoints):
    template, tokenizer, _ = checkpoints["chatml"]
    [row] = template.encode_rows([Conversation((Turn("text", "the <|im_end|>"),))], tokenizer)[0]
    bos, eos = tokenizer.added["<|begin|>"], tokenizer.added["<|endoftext|>"]
    assert row == ([bos, *tokenizer.encode("the <|im_end|>"), eos], [False] + [True] * (len(row.ids) - 1), [])


def test_the_stop_token_is_what_follows_an_answer_and_rows_are_filled_with_the_pad_token(checkpoints):
    for name, stop in {"chatml": "<|im_end|>", "headers, text trimmed": "<|eot|>"}.items():
        template, tokenizer, _ = checkpoints[name]
        assert template.stop_id(tokenizer) == tokenizer.added[stop]
        assert template.pad_id(tokenizer) == tokenizer.added["<|endoftext|>"]


# ---- what cannot be used


REFUSED = {
    "an answer does not go on from its prompt": TEMPLATES["chatml"].replace(
        "assistant\\n' }}", "assistant\\n<think>' }}"
    ),
    "writes no special token behind an answer": PLAIN,
    "refuses a conversation (user): not today": "{{ raise_exception('not today') }}",
    "is no jinja": "{% for m in messages %}",
}


@pytest.mark.parametrize("said", sorted(REFUSED))
def test_a_template_that_cannot_be_learnt_from_is_refused(tmp_path, said):
    folder = write_tokenizer(tmp_path, REFUSED[said])
    conversation = Conversation((Turn("user", "a"), Turn("assistant", "b")))
    with pytest.raises(UserError) as refused:
        JinjaTemplate.read(folder).encode_rows([conversation], ChatTokenizer.load(folder, ()))
    assert said in str(refused.value) and refused.value.fix == "--template ours"
    if "go on" in said:  # both texts, from shortly before they part
        assert "assistant\\n<think>'" in str(refused.value) and "assistant\\nYes<|im_end|>" in str(refused.value)


def test_what_a_template_may_not_do_it_cannot(tmp_path):
    folder = write_tokenizer(tmp_path, "{{ messages.append(1) }}{{ ''.__class__.__mro__ }}")
    with pytest.raises(UserError, match="refuses a conversation"):
        JinjaTemplate.read(folder).stop_id(ChatTokenizer.load(folder, ()))


def test_a_configuration_that_is_no_json_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json is no JSON"):
        JinjaTemplate.read(tmp_path)


# ---- where a template is read from, and how it is kept


def test_a_template_is_found_wherever_checkpoints_keep_it(tmp_path):
    def reads(files):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        found = JinjaTemplate.read(tmp_path)
        return found and (found.source, found.variables)

    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    eos = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": None}
    assert reads({}) is None
    assert reads({"tokenizer_config.json": json.dumps({"chat_template": "x"} | eos)}) == ("x", {"eos_token": "</s>"})
    assert reads({"tokenizer_config.json": json.dumps({"chat_template": named})}) == ("d", {})
    both = {"tokenizer_config.json": '{"chat_template": "x"}', "chat_template.jinja": "file"}
    assert reads(both) == ("file", {})
    specials = {"special_tokens_map.json": '{"eos_token": "<e>", "pad_token": "<p>"}', **both}
    assert reads(specials | {"tokenizer_config.json": '{"eos_token": "<c>"}'})[1] == {
        "eos_token": "<c>",
        "pad_token": "<p>",
    }


def test_a_date_is_settled_once_and_kept(tmp_path, monkeypatch):
    folder = write_tokenizer(tmp_path / "checkpoint", TEMPLATES["today's date"])
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"q{i}", "response": f"a{i}"}) + "\n" for i in range(30)))

    def prepared_on(day: date) -> Prepared:
        class Day(date):
            @classmethod
            def today(cls):
                return day

        monkeypatch.setattr(jinja, "date", Day)
        return prepare([data], [], tmp_path / "out", tokenizer=folder, seq=256, template=JinjaTemplate.read(folder))

    first = prepared_on(date(2026, 11, 22))
    again = prepared_on(date(2026, 11, 23))
    assert again.report["reused"] and again.template == first.template and first.template.date == "2026-11-22"
    assert "Today is 22 November 2026." in first.tokenizer.decode(first.train.ids(0).tolist())
    assert again.template.prompt([Turn("user", "a")], first.tokenizer) == first.template.prompt(
        [Turn("user", "a")], first.tokenizer
    )
    assert JinjaTemplate.read(folder, date="2020-02-02").dated().date == "2020-02-02"


def test_prepared_data_counts_the_conversations_that_became_several_rows(tmp_path):
    folder = write_tokenizer(tmp_path / "checkpoint", TEMPLATES["earlier thinking dropped"])
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": pair * (1 + i % 2)}) + "\n" for i in range(2)))
    prepared = prepare([data], [data], tmp_path / "out", tokenizer=folder, seq=256, template=JinjaTemplate.read(folder))
    assert (prepared.report["train"]["conversations"], prepared.report["train"]["documents"]) == (2, 3)
    assert "2 conversations in a row for each answer" in report_text(prepared.report)
    assert len(prepared.eval) == 3 and len(prepared.eval_conversations()) == 2


def test_the_template_is_chosen_by_name(tmp_path):
    folder = write_tokenizer(tmp_path / "with", TEMPLATES["chatml"])
    bare = write_tokenizer(tmp_path / "without", None)
    assert choose_template("auto", folder) == JinjaTemplate.read(folder)
    assert (
        choose_template("auto", bare) == choose_template("auto", None) == choose_template("ours", folder) == Template()
    )
    (tmp_path / "mine.jinja").write_text(PLAIN)
    mine = choose_template(str(tmp_path / "mine.jinja"), folder)
    assert mine.source == PLAIN and mine.variables["eos_token"] == "<|endoftext|>"
    mine.save(tmp_path / "kept.json")
    assert choose_template(str(tmp_path / "kept.json"), None) == load_template(tmp_path / "kept.json") == mine
    with pytest.raises(UserError, match="needs the tokens of a checkpoint"):
        choose_template("mine.jinja", None)
    with pytest.raises(UserError, match="there is no template"):
        choose_template("nowhere.jinja", folder)


# ---- models


def small(vocab_size: int, **changes) -> GPT:
    sizes = dict(num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, hidden_dim=8, max_positions=64)
    return GPT(preset("nano", norm="rmsnorm", vocab_size=vocab_size, **sizes, **changes))


@given(tied=st.booleans(), known=st.integers(2, 9), more=st.integers(1, 7), spare=st.integers(0, 9))
def test_new_tokens_start_as_the_mean_of_the_others_which_stay(tied, known, more, spare):
    model = small(known + spare, tied=tied).double()
    before = [layer.weight.clone() for layer in (model.embed.tokens, model.head)]
    others = {n: p.clone() for n, p in model.named_parameters() if "tokens" not in n and "head" not in n}
    [line] = grow(model, known, known + more)
    assert f"{more} tokens" in line and ("to spare" in line) == (more <= spare)
    assert model.config.vocab_size == known + max(more, spare)
    for layer, old in zip((model.embed.tokens, model.head), before):
        assert layer.weight.shape[0] == model.config.vocab_size and torch.equal(layer.weight[:known], old[:known])
        assert torch.allclose(layer.weight[known : known + more], old[:known].mean(0), rtol=0, atol=1e-12)
        assert torch.equal(layer.weight[known + more : len(old)], old[known + more :])
    assert (model.head.weight is model.embed.tokens.weight) == tied
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
    model(torch.tensor([[known + more - 1]]), torch.tensor([[known]])).sum().backward()


@pytest.mark.parametrize("source", [TEMPLATES["today's date"], None], ids=["its own", "ours"])
def test_a_checkpoint_is_loaded_kept_and_loaded_again(tmp_path, source):
    original = small(340)
    hf.save(tmp_path / "in", original.config, dict(original.named_parameters()))
    write_tokenizer(tmp_path / "in", source)
    chat = ChatModel.load(tmp_path / "in")
    chat.save(tmp_path / "out")
    again = ChatModel.load(tmp_path / "out")
    assert again.template == chat.template and again.tokenizer.digest == chat.tokenizer.digest
    turns = [Turn("user", "the"), Turn("assistant", "cat"), Turn("user", "a")]
    assert again.template.prompt(turns, again.tokenizer) == chat.template.prompt(turns, chat.tokenizer)
    for name, p in again.model.named_parameters():
        assert torch.equal(p, chat.model.get_parameter(name))
    known = chat.tokenizer.size - (0 if source else len(SPECIALS))
    assert torch.equal(chat.model.embed.tokens.weight[:known], original.embed.tokens.weight[:known])
    assert isinstance(chat.template, JinjaTemplate if source else Template)
    assert len(chat.notes) == (source is None) and again.notes == ()


def test_documents_of_a_checkpoint_pad_with_its_token(checkpoints):
    template, tokenizer, _ = checkpoints["chatml"]
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    documents = encode_documents([Conversation(turns, "t")] * 2, tokenizer, template)
    assert documents.pad == tokenizer.added["<|endoftext|>"] and len(documents) == 2 and documents.tasks == ["t"]
