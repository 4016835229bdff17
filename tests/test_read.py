"""Laws of reading: every dialect says the same conversation; no bytes raise anything but a UserError."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from minispeed.chat import read as reader
from minispeed.chat.conversation import Conversation, Turn
from minispeed.chat.dialects import FORMATS
from minispeed.chat.read import detect, read
from minispeed.errors import UserError

TURNS = (Turn("user", "2+2?"), Turn("assistant", "4"))
SAME = {  # one conversation in every dialect
    "OpenAI messages": {"messages": [{"role": r, "content": t} for r, t in TURNS]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "Alpaca": {"instruction": "2+2?", "input": "", "output": "4", "text": "all of it once more"},
    "DeepSpeed-Chat prompt/chosen": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "prompt/response": {"prompt": "2+2?", "response": "4"},
    "question/answer": {"question": "2+2?", "answer": "4"},
}
GOOD = json.dumps(SAME["question/answer"])


def write(path, text, *, compressed=False):
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(content, mtime=0) if compressed else content)
    return path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("shape", ["lines", "array", "pretty"])
@pytest.mark.parametrize("name", SAME)
def test_every_dialect_says_the_same(tmp_path, name, shape, compressed):
    records = [SAME[name], SAME[name]]
    lines = "\n\n".join(map(json.dumps, records))
    text = {"lines": lines, "array": json.dumps(records), "pretty": json.dumps(records, indent=1)}[shape]
    path = write(tmp_path / "sums.v1.json", "\ufeff" + text, compressed=compressed)
    reading = read(path)
    assert detect(path) == reading.format == name
    assert [line.conversation for line in reading.lines] == [Conversation(TURNS, "sums")] * 2
    assert [line.number for line in reading.lines] == ([1, 3] if shape == "lines" else [1, 2])  # blank lines count


def test_task_metric_system_and_parts_are_read(tmp_path):
    record = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    path = write(tmp_path / "x", json.dumps({**record, "task": "t", "metric": "label", "system": "be brief"}))
    turns = (Turn("system", "be brief"), Turn("user", "ab"))
    assert read(path).lines[0].conversation == Conversation(turns, "t", "label")


def test_alpaca_input_follows_the_instruction(tmp_path):
    path = write(tmp_path / "x", json.dumps({"instruction": "Add", "input": "1 2", "output": "3"}))
    assert read(path).lines[0].conversation.turns == (Turn("user", "Add\n\n1 2"), Turn("assistant", "3"))


def test_plain_text_is_one_turn(tmp_path):
    assert read(write(tmp_path / "x", '{"text": "once"}')).lines[0].conversation.turns == (Turn("text", "once"),)


@pytest.mark.parametrize("prompt", ["\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "Human: c Assistant:"])
def test_marked_prompts_become_turns(tmp_path, prompt):
    path = write(tmp_path / "x", json.dumps({"prompt": prompt, "chosen": " d"}))
    before = (Turn("user", "a"), Turn("assistant", "b")) if "b" in prompt else ()
    assert read(path).lines[0].conversation.turns == (*before, Turn("user", "c"), Turn("assistant", "d"))


def messages(*turns):
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [{"role": "user"', "is not JSON"),
        (b'{"messages": "\xff"}', "is not UTF-8: byte 0xff at column 15"),
        (b"[1]", "must be an object, is a list"),
        (b"null", "must be an object, is null"),
        (b'{"prompt": "x"}', 'lacks "messages", which all of OpenAI messages has; its keys are'),
        (b'{"messages": []}', "must be a list of at least one turn, is an empty list"),
        (b'{"messages": {"role": "user"}}', "must be a list of at least one turn, is an object"),
        (b'{"messages": ["hello"]}', "turn 1 must be an object"),
        (b'{"messages": [{"role": "user"}]}', 'turn 1: "content" is missing'),
        (b'{"messages": [{"role": 3, "content": "x"}]}', 'turn 1: "role" must be text, is a number'),
        (messages(("user", None)), 'turn 1: "content" must be text, is null'),
        (messages(("user", [{"type": "image_url"}])), "parts that are not text"),
        (
            messages(("user", "a"), ("asistant", "b")),
            "turn 2: role 'asistant' is not known; is it 'assistant'?",
        ),
        (messages(("tool", "x")), "role 'tool' is not known; known: system"),
        (messages(("text", "x")), "role 'text' is not known"),
        (messages(("user", "a"), ("assistant", " \n")), "turn 2 (assistant) is empty"),
        (messages(("user", "\ud800")), "half of a surrogate pair"),
        (
            messages(("user", "a"))[:-1] + ', "metric": "bleu"}',
            '"metric" must be one of exact, label, opening',
        ),
        (messages(("user", "a"))[:-1] + ', "task": 3}', '"task" must be text, is a number'),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"messages": ' + b"9" * 5000 + b"}", "thousands of digits"),
    ],
)
def test_a_malformed_line_is_named_with_its_reason(tmp_path, line, reason):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "x.jsonl", messages(("user", "fine")).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert "1 of 2 records are malformed" in str(error.value)
    assert "x.jsonl:2: " in str(error.value) and reason in str(error.value)
    reading = read(path, skip_bad=True)
    assert [number for number, _ in reading.bad] == [2] and reason in reading.bad[0][1]
    assert [line.number for line in reading.lines] == [1]


def test_the_first_ten_are_named_and_the_rest_counted(tmp_path):
    path = write(tmp_path / "x.jsonl", GOOD + "\n" + "{}\n" * 12)
    with pytest.raises(UserError, match="12 of 13 records") as error:
        read(path)
    assert "x.jsonl:11:" in str(error.value) and "x.jsonl:12:" not in str(error.value)
    assert "and 2 more" in str(error.value)


def test_a_gigantic_line_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "LONGEST_LINE", 100)
    path = write(tmp_path / "x", GOOD + "\n" + "[" + "7," * 500 + "\n" + GOOD + "\n")
    reading = read(path, skip_bad=True)
    assert reading.bad == [(2, "is longer than 100 bytes")]
    assert [line.number for line in reading.lines] == [1, 3]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"[]", "is empty"),
        (b"[{}, ", "is a JSON array with a mistake"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', "not UTF-8: byte 0xff at line 2, column 11"),
        (b"hello", "neither JSON Lines nor a JSON array"),
        (b'{"a": 1, "b": 2}', "its first record has the keys 'a', 'b'"),
        (b"17", "its first record is a number"),
        (b'{"text": ""}', "x.jsonl:1: turn 1 (text) is empty"),
        (gzip.compress(b'{"text": "a"}' * 100, mtime=0)[:-9], "is not a whole gzip file"),
        (b"\x1f\x8bnonsense", "is not a whole gzip file"),
        (gzip.compress(b'{"text": "a"}', mtime=0)[:10] + b"\xff" * 30, "is not a whole gzip file"),
    ],
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_file_without_conversations_is_one_sentence(tmp_path, content, sentence, skip_bad):
    with pytest.raises(UserError, match=r"x\.jsonl") as error:
        read(write(tmp_path / "x.jsonl", content), skip_bad=skip_bad)
    assert sentence in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no file .*nowhere"):
        detect(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted({key for form in FORMATS for key in form.keys} | {"input", "task", "metric", "system"})
turn_like = st.fixed_dictionaries({}, optional={k: json_values for k in ("role", "content", "from", "value")})
records = st.dictionaries(st.sampled_from(KEYS), json_values | st.lists(turn_like, max_size=3), max_size=4)
lines = st.one_of(
    records.map(lambda r: json.dumps(r).encode()),
    json_values.map(lambda v: json.dumps(v).encode()),
    st.binary(max_size=30),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.sampled_from([json.dumps(r).encode() for r in SAME.values()]) | lines, max_size=5),
    st.booleans(),
)
def test_whatever_the_bytes_only_a_user_error(tmp_path, content, array):
    separator = b"," if array else b"\n"
    text = separator.join(content)
    path = write(tmp_path / "x", b"[" + text + b"]" if array else text)
    try:
        reading = read(path, skip_bad=True)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert reading.lines and all(turn.text.strip() for line in reading.lines for turn in line.conversation.turns)
