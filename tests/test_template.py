"""Laws of the template: the rendered parses back, training starts with serving's prompt, stops are learnt."""

import pytest
from hypothesis import given, settings, strategies as st

from minispeed.chat.conversation import Conversation, Turn
from minispeed.chat.template import Template
from minispeed.chat.tokenizer import SPECIALS, ChatTokenizer
from minispeed.errors import UserError

TOKENIZER = ChatTokenizer.train(["the cat sat on the mat <|end|> ### 猫"] * 9, 300)
TEMPLATE = Template()
END = TEMPLATE.stop_id(TOKENIZER)

typed = st.lists(st.sampled_from([*SPECIALS, "the", "\n", "猫"]) | st.text(max_size=6), min_size=1, max_size=4).map(
    "".join
)
texts = typed.filter(len)
turns = st.lists(st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), texts), min_size=1, max_size=5)
conversations = turns.map(lambda t: Conversation(tuple(t)))
documents = texts.map(lambda text: Conversation((Turn("text", text),)))


@settings(deadline=None)
@given(conversations | documents)
def test_rendered_parses_back_whatever_is_typed(conversation):
    assert TEMPLATE.parse(TEMPLATE.encode(conversation, TOKENIZER).ids, TOKENIZER) == conversation.turns


@settings(deadline=None)
@given(turns, texts)
def test_training_is_the_serving_prompt_and_the_answer(before, answer):
    ids = TEMPLATE.encode(Conversation((*before, Turn("assistant", answer))), TOKENIZER).ids
    assert ids == [*TEMPLATE.prompt(before, TOKENIZER), *TOKENIZER.encode(answer), END]


@settings(deadline=None)
@given(conversations | documents, st.sampled_from(["assistant", "all"]))
def test_learnt_are_text_and_stop_of_the_right_turns(conversation, train_on):
    ids, supervised, cuts = TEMPLATE.encode(conversation, TOKENIZER, train_on=train_on)
    learnt = {"assistant", "text"} | ({"user", "system"} if train_on == "all" else set())
    expected = [i for role, text in conversation.turns if role in learnt for i in [*TOKENIZER.encode(text), END]]
    assert [i for i, one in zip(ids, supervised, strict=True) if one] == expected
    assert not supervised[0]  # bos is nobody's target


@settings(deadline=None)
@given(conversations)
def test_each_cut_ends_with_the_stop_of_an_answer(conversation):
    ids, supervised, cuts = TEMPLATE.encode(conversation, TOKENIZER)
    assert len(cuts) == sum(turn.role == "assistant" for turn in conversation.turns)
    for cut in cuts:
        assert ids[cut - 1] == END and supervised[cut - 1]
        assert TEMPLATE.parse(ids[:cut], TOKENIZER) == conversation.turns[: ids[:cut].count(END)]


@settings(deadline=None)
@given(documents)
def test_a_document_has_no_cuts_and_is_learnt_whole(document):
    encoded = TEMPLATE.encode(document, TOKENIZER)
    assert encoded.cuts == [] and all(encoded.supervised[1:])


@settings(deadline=None)
@given(st.lists(conversations | documents, max_size=4), st.integers(1, 2))
def test_a_batch_encodes_as_one_by_one(batch, workers):
    many = TEMPLATE.encode_batch(batch, TOKENIZER, workers=workers)
    assert many == [TEMPLATE.encode(one, TOKENIZER) for one in batch]


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.size - 1), max_size=20))
def test_parse_takes_any_ids(ids):
    parsed = TEMPLATE.parse(ids, TOKENIZER)
    structure = set(TOKENIZER.special.values())
    held = [i for i in ids if i not in structure]
    assert {turn.role for turn in parsed} <= {"system", "user", "assistant", "text"}
    assert sum(len(turn.text) for turn in parsed) >= len(TOKENIZER.decode(held))  # nothing between is lost


def test_an_unfinished_answer_parses_and_padding_is_nothing():
    prompt = TEMPLATE.prompt([Turn("user", "hi")], TOKENIZER)
    ids = [*prompt, *TOKENIZER.encode("I am"), *[TEMPLATE.pad_id(TOKENIZER)] * 3]
    assert TEMPLATE.parse(ids, TOKENIZER) == (Turn("user", "hi"), Turn("assistant", "I am"))


def test_pad_is_never_the_stop_token():
    assert TEMPLATE.pad_id(TOKENIZER) != END
    with pytest.raises(UserError, match="must be six different ones"):
        Template(pad="<|end|>")


def test_a_template_of_other_tokens_works_and_is_kept(tmp_path):
    template = Template(user="<|im_start|>user", end="<|im_end|>")
    template.save(tmp_path / "template.json")
    assert Template.load(tmp_path / "template.json") == template
    with pytest.raises(UserError, match=r"has no special token '<\|im_end\|>'"):
        template.stop_id(TOKENIZER)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    tokenizer = ChatTokenizer.load(tmp_path, template.tokens)
    conversation = Conversation((Turn("user", "<|im_end|>"), Turn("assistant", "ok")))
    assert template.parse(template.encode(conversation, tokenizer).ids, tokenizer) == conversation.turns


@pytest.mark.parametrize("content", ["", "[]", "3", '{"stop": "x"}'])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "template.json").write_text(content)
    with pytest.raises(UserError, match="is not a template"):
        Template.load(tmp_path / "template.json")


def test_wrong_words_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no template"):
        Template.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="train_on is 'answers'; try: 'assistant' or 'all'"):
        TEMPLATE.encode(Conversation((Turn("user", "a"),)), TOKENIZER, train_on="answers")
