"""Laws of the tokenizer: every text comes back, none becomes special, streams say whole characters."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minispeed.chat.tokenizer import SPECIALS, ChatTokenizer, Stream
from minispeed.errors import UserError

TEXTS = [
    "the cat sat on the mat",
    "12345 cats, naïve café, 猫は猫",
    "the end of the user",
    "<|end|> <|user|>",
] * 20
TOKENIZER = ChatTokenizer.train(TEXTS, 400)
BARE = Tokenizer.from_str(json.dumps(json.loads(TOKENIZER._whole.to_str()) | {"added_tokens": []}))

spelt = st.sampled_from([*SPECIALS, "<tool>", "</s>", "  ", "the cat", "猫", "1984", "\x00", "\ufffd", "🙂", "e\u0301"])
texts = st.lists(spelt | st.text(max_size=8), max_size=6).map("".join)


def load(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return ChatTokenizer.load(tmp_path)


@settings(deadline=None)
@given(texts)
def test_every_text_comes_back_and_none_is_special(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(ids, special=True) == text
    assert not set(ids) & set(TOKENIZER.special.values())
    assert max(ids, default=0) < TOKENIZER.size


@settings(deadline=None)
@given(texts)
def test_text_is_encoded_as_if_there_were_no_special_tokens(text):
    assert TOKENIZER.encode(text) == BARE.encode(text).ids


@settings(deadline=None)
@given(st.lists(texts, max_size=5))
def test_a_batch_encodes_as_one_by_one(batch):
    assert TOKENIZER.encode_batch(batch) == [TOKENIZER.encode(text) for text in batch]


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.size - 1), max_size=30), st.booleans())
def test_a_stream_of_any_ids_says_what_decode_says(ids, special):
    stream = Stream(TOKENIZER, special=special)
    assert "".join([*map(stream.feed, ids), stream.flush()]) == TOKENIZER.decode(ids, special=special)


@settings(deadline=None)
@given(texts, st.integers(1, 4))
def test_a_stream_returns_whole_characters(text, step):
    stream, said = Stream(TOKENIZER), ""
    ids = TOKENIZER.encode(text)
    for low in range(0, len(ids), step):
        said += stream.feed(ids[low : low + step])
        assert text.startswith(said)
    assert said + stream.flush() == text


def test_half_a_character_is_held_back():
    stream = Stream(TOKENIZER)
    ids = TOKENIZER.encode("🙂")
    assert len(ids) == 4 and [stream.feed(i) for i in ids] == ["", "", "", "🙂"]
    assert stream.feed(ids[0]) == "" and stream.flush() == "\ufffd" and stream.flush() == ""


def test_digits_stand_alone():
    assert len(TOKENIZER.encode("12345" * 7)) == 35


def test_training_is_the_same_in_another_process(tmp_path):
    code = (
        "import sys, json; from minispeed.chat.tokenizer import ChatTokenizer;"
        "print(ChatTokenizer.train(json.loads(sys.argv[1]), 400).digest); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, json.dumps(TEXTS)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"}, check=True
    )
    assert done.stdout.strip() == TOKENIZER.digest


def test_saved_and_loaded_it_is_the_same(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    again = ChatTokenizer.load(tmp_path)
    assert (again.digest, again.size, again.special) == (TOKENIZER.digest, TOKENIZER.size, TOKENIZER.special)
    assert ChatTokenizer.load(tmp_path / "tokenizer.json").encode("<|end|>") == TOKENIZER.encode("<|end|>")


def byte_level(*added):
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_tokens(list(added))
    return tokenizer


def test_a_given_tokenizer_gets_what_it_lacks_and_its_own_tokens_stay_out_of_text(tmp_path):
    ordinary = [AddedToken(token, special=False) for token in ("<tool>", "<|end|>", "  ")]
    given_tokenizer = byte_level(*ordinary, AddedToken("</s>", special=True))
    given_tokenizer.enable_truncation(3)
    given_tokenizer.enable_padding(length=9)
    tokenizer = load(tmp_path, given_tokenizer)
    assert set(tokenizer.special) == {*SPECIALS, "</s>"}
    assert tokenizer.special["<|end|>"] == given_tokenizer.token_to_id("<|end|>")  # has it: not added twice
    assert tokenizer.size == 256 + 4 + 5
    for text in ("<tool>", "<|end|>", "</s>", "a<|user|>b"):
        ids = tokenizer.encode(text)
        assert max(ids) < 256 and tokenizer.decode(ids) == text
    assert tokenizer.encode("a  b")[1] == given_tokenizer.token_to_id("  ")  # white space is no special
    assert tokenizer.decode([given_tokenizer.token_to_id("<tool>")]) == "<tool>"  # generated, it is seen


def test_an_added_token_that_is_ordinary_changes_no_text(tmp_path):
    with_merges = Tokenizer.from_str(BARE.to_str())
    with_merges.add_tokens([AddedToken("the cat", special=False)])
    assert with_merges.encode("the cat sat").tokens[0] == "the cat"
    assert load(tmp_path, with_merges).encode("the cat sat") == BARE.encode("the cat sat").ids


def test_a_model_that_finds_special_tokens_itself_is_kept_from_it(tmp_path):
    pieces = [("<unk>", -9.0), ("</s>", 0.0), *[(c, -5.0) for c in "</s>ab"]]
    tokenizer = Tokenizer(models.Unigram(list(dict(pieces).items()), 0, False))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("a</s>b").tokens == ["a", "</s>", "b"]  # the library's switch is not enough
    chat = load(tmp_path, tokenizer)
    ids = chat.encode("a</s>b")
    assert chat.special["</s>"] not in ids and chat.decode(ids) == "a</s>b"


def test_a_model_that_insists_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, "<unk>"))
    tokenizer.add_special_tokens(["<unk>"])
    with pytest.raises(UserError, match="reads a special token in the text 'b'"):
        load(tmp_path, tokenizer).encode("b")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"added_tokens": []}', '{"added_tokens": [3]}', "\x00"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        ChatTokenizer.load(tmp_path)


def test_a_missing_file_and_a_small_vocabulary_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no tokenizer .*tokenizer\.json"):
        ChatTokenizer.load(tmp_path)
    with pytest.raises(UserError, match="vocabulary of 100 has no room .*; try: 262 or more"):
        ChatTokenizer.train(TEXTS, 100)


def test_tokens_that_are_added_on_loading_are_counted_and_come_last(tmp_path):
    plain = ChatTokenizer.train(["the cat"], 300, ("<|end|>",))
    plain.save(tmp_path / "tokenizer.json")
    loaded = ChatTokenizer.load(tmp_path, SPECIALS)
    new = set(SPECIALS) - {"<|end|>"}
    assert (plain.lacked, loaded.lacked, loaded.size) == (0, len(new), plain.size + len(new))
    assert {loaded.added[token] for token in new} == set(range(plain.size, loaded.size))
    assert loaded.every == set(SPECIALS) == set(loaded.special)
