"""Laws of preparing: no supervised token is lost, nothing is half written, a second run reads nothing."""

import json
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from minispeed.chat import prepare as preparing
from minispeed.chat.conversation import Conversation, Turn
from minispeed.chat.pack import IGNORED, Packing
from minispeed.chat.prepare import prepare
from minispeed.chat.prepared import Prepared
from minispeed.chat.show import report_text
from minispeed.chat.tokenizer import ChatTokenizer
from minispeed.errors import UserError

SMALL = {"vocab_size": 300, "seq": 64}


def pair(asked, answered):
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "sums.jsonl", [pair(f"{i}+{i}?", f"it is {2 * i}") for i in range(60)])


def contents(folder):
    """Every file of a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def beside(out):
    return sorted(p.name for p in out.parent.iterdir())


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
turn = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": text})
record = st.fixed_dictionaries({"messages": st.lists(turn, min_size=1, max_size=4)})


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(record, min_size=2, max_size=12),
    st.integers(8, 60),
    st.sampled_from(["assistant", "all"]),
    st.data(),
)
def test_every_supervised_token_is_in_a_row_or_counted(tmp_path_factory, records, seq, train_on, drawn):
    folder = tmp_path_factory.mktemp("run")
    paths = [write(folder / "a.jsonl", records[:1]), write(folder / "b.jsonl", records[1:])]
    try:
        prepared = prepare(paths, [], folder / "out", vocab_size=262, seq=seq, train_on=train_on)
    except UserError as error:
        assert "shorter than the shortest" in str(error) and not (folder / "out").exists()
        return
    learnt_roles = {"assistant"} if train_on == "assistant" else {"assistant", "user", "system"}
    turns = [t for r in records for t in r["messages"] if t["role"] in learnt_roles]
    expected = Counter(i for t in turns for i in prepared.tokenizer.encode(t["content"]))
    expected[prepared.template.stop_id(prepared.tokenizer)] += len(turns)

    stored = Counter()
    for part, documents in (("train", prepared.train), ("eval", prepared.eval)):
        stored += Counter(documents.tokens[documents.learnt].tolist())
        report = prepared.report[part]
        assert (report["tokens"], report["supervised"]) == (len(documents.tokens), documents.learnt.sum())
        assert report["conversations"] == len(documents) == sum(report["lengths"].values())
    assert stored == +expected

    batch = drawn.draw(st.integers(1, 3))
    packed = Packing(prepared.train, seq=seq, batch=batch)
    labels = np.concatenate([packed.batch(0, step).labels for step in range(packed.steps_per_epoch())])
    kept = Counter(labels[labels != IGNORED].tolist())
    train = Counter(prepared.train.tokens[prepared.train.learnt].tolist())
    assert kept <= train and (train - kept).total() == packed.truncated.tokens
    assert packed.truncated._asdict() == prepared.report["train"]["truncated"]


def test_a_second_run_parses_and_encodes_nothing(tmp_path, data, monkeypatch):
    first = prepare([data], [], tmp_path / "out", **SMALL)
    before = contents(tmp_path / "out")
    for name in ("read", "_encode", "_documents"):
        monkeypatch.setattr(preparing, name, None)
    monkeypatch.setattr(ChatTokenizer, "train", None)
    second = prepare([data], [], tmp_path / "out", workers=2, **SMALL)
    assert not first.report["reused"] and second.report["reused"]
    assert report_text(second.report).split("\n")[1:] == report_text(first.report).split("\n")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    "change", [{"seq": 63}, {"seed": 1}, {"train_on": "all"}, {"vocab_size": 301}, {"skip_bad": True}]
)
def test_another_option_prepares_anew(tmp_path, data, change):
    prepare([data], [], tmp_path / "out", **SMALL)
    again = prepare([data], [], tmp_path / "out", **{**SMALL, **change})
    assert not again.report["reused"] and beside(tmp_path / "out") == ["out", "sums.jsonl"]


def test_other_content_prepares_anew_and_the_same_elsewhere_does_not(tmp_path, data):
    prepare([data], [], tmp_path / "out", **SMALL)
    (tmp_path / "moved").mkdir()
    moved = data.rename(tmp_path / "moved" / data.name)
    os.utime(moved, (0, 0))
    assert prepare([moved], [], tmp_path / "out", **SMALL).report["reused"]
    moved.write_text(moved.read_text(encoding="utf-8").replace("it is 2", "it was 2"), encoding="utf-8")
    assert not prepare([moved], [], tmp_path / "out", **SMALL).report["reused"]


def test_the_result_does_not_depend_on_workers(tmp_path, data):
    one = prepare([data], [], tmp_path / "one", workers=1, **SMALL)
    two = prepare([data], [], tmp_path / "two", workers=2, **SMALL)
    assert one.report["key"] == two.report["key"] and contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("moment", ["read", "_tokenizer_for", "_documents", "_figures", "write_beside_documents"])
@pytest.mark.parametrize("before", [False, True])
def test_a_run_that_dies_leaves_what_was_there(tmp_path, data, monkeypatch, moment, before):
    out = tmp_path / "out"
    if before:
        prepare([data], [], out, **SMALL)
    was = contents(out)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, moment, die)
    with pytest.raises(KeyboardInterrupt):
        prepare([data], [], out, **SMALL, seed=3)
    assert contents(out) == was and beside(out) == (["out", "sums.jsonl"] if before else ["sums.jsonl"])


def test_a_folder_of_something_else_is_left_alone(tmp_path, data):
    (tmp_path / "out").mkdir()
    prepare([data], [], tmp_path / "out", **SMALL)  # an empty one is taken
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    for out in (tmp_path / "home", data):
        with pytest.raises(UserError, match="exists and is not prepared data"):
            prepare([data], [], out, **SMALL)
    assert contents(tmp_path / "home") == {"thesis.tex": b"years"}


def test_without_evaluation_data_equal_conversations_are_held_out_together(tmp_path):
    records = [pair(f"{i}+1?", str(i + 1)) for i in range(400)]
    path = write(tmp_path / "a.jsonl", records + records[::-1])
    prepared = prepare([path], [], tmp_path / "out", **SMALL)
    train = {bytes(prepared.train.ids(i)) for i in range(len(prepared.train))}
    held = {bytes(prepared.eval.ids(i)) for i in range(len(prepared.eval))}
    assert not train & held and len(train) + len(held) == 400
    assert len(prepared.eval) == 2 * len(held) and 8 <= len(held) <= 36
    assert prepared.report["held_out"]
    assert prepared.report["notices"]["exact duplicates"]["count"] == 400
    other = prepare([write(tmp_path / "b.jsonl", records)], [], tmp_path / "other", **SMALL)
    assert {c.turns for c in other.eval_conversations()} == {c.turns for c in prepared.eval_conversations()}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_tiny_data_set_keeps_something_to_train_on(tmp_path, count):
    path = write(tmp_path / "a.jsonl", [pair(f"{i}?", "yes") for i in range(count)])
    for seed in range(5):
        prepared = prepare([path], [], tmp_path / "out", **SMALL, seed=seed)
        assert len(prepared.train) >= 1 and len(prepared.eval) == (1 if count > 1 else 0)


def test_given_evaluation_data_is_the_evaluation_part(tmp_path, data):
    held = write(
        tmp_path / "held.jsonl",
        [pair("1+1?", "it is 2"), {**pair("x", "y"), "task": "odd", "metric": "label"}],
    )
    text = write(tmp_path / "book.jsonl", [{"text": "once upon a time"}])
    prepared = prepare([data, text], [held, text], tmp_path / "out", **SMALL)
    assert (len(prepared.train), len(prepared.eval)) == (61, 3) and not prepared.report["held_out"]
    assert prepared.train.source.tolist() == [0] * 60 + [1] and prepared.eval.source.tolist() == [0, 0, 1]
    names = [prepared.eval.tasks[task] for task in prepared.eval.task]
    assert names == ["held", "odd", "book"] and prepared.train.tasks == prepared.eval.tasks
    assert prepared.eval_conversations() == [
        Conversation((Turn("user", "1+1?"), Turn("assistant", "it is 2")), "held"),
        Conversation((Turn("user", "x"), Turn("assistant", "y")), "odd", "label"),
        Conversation((Turn("text", "once upon a time"),), "book"),
    ]
    found = prepared.report["notices"]["evaluation prompts that are also in training"]
    assert found == {"count": 2, "where": ["held.jsonl:1", "book.jsonl:1"]}


def test_malformed_lines_stop_it_or_are_counted(tmp_path, data):
    with open(data, "a", encoding="utf-8") as file:
        file.write('{"messages": []}\n')
    with pytest.raises(UserError, match=r"sums\.jsonl:61: "):
        prepare([data], [], tmp_path / "out", **SMALL)
    assert beside(tmp_path / "out") == ["sums.jsonl"]
    prepared = prepare([data], [], tmp_path / "out", skip_bad=True, **SMALL)
    (file,) = prepared.report["train"]["files"]
    assert (file["malformed"], file["malformed_at"], file["conversations"]) == (1, [61], 60)


def test_a_given_tokenizer_is_used_and_belongs_to_the_key(tmp_path, data):
    given_tokenizer = ChatTokenizer.train(["it is"] * 9, 270)
    given_tokenizer.save(tmp_path / "tokenizer.json")
    prepared = prepare([data], [], tmp_path / "out", tokenizer=tmp_path, **SMALL)
    assert prepared.tokenizer.digest == prepared.report["tokenizer"] == given_tokenizer.digest
    ChatTokenizer.train(["there"] * 9, 270).save(tmp_path / "tokenizer.json")
    assert not prepare([data], [], tmp_path / "out", tokenizer=tmp_path, **SMALL).report["reused"]


def test_nothing_to_learn_is_noticed(tmp_path, data):
    mute = write(tmp_path / "mute.jsonl", [{"messages": [{"role": "user", "content": "anyone?"}]}])
    notices = prepare([data, mute], [data], tmp_path / "out", **SMALL).report["notices"]
    assert notices["conversations with nothing to learn"] == {"count": 1, "where": ["mute.jsonl:1"]}
    assert notices["conversations whose last turn is not the assistant's"] == {
        "count": 1,
        "where": ["mute.jsonl:1"],
    }


def test_what_is_missing_or_damaged_is_named(tmp_path, data):
    with pytest.raises(UserError, match="no data file is given"):
        prepare([], [], tmp_path / "out")
    with pytest.raises(UserError, match="there is no file .*nowhere"):
        prepare([tmp_path / "nowhere"], [], tmp_path / "out")
    with pytest.raises(UserError, match="context of 2 tokens is shorter"):
        prepare([data], [], tmp_path / "out", vocab_size=300, seq=2)
    with pytest.raises(UserError, match="holds no data prepared"):
        Prepared.open(tmp_path / "out")
    prepare([data], [], tmp_path / "out", **SMALL)
    (tmp_path / "out" / "train" / "tokens.npy").unlink()
    with pytest.raises(UserError, match="is damaged"):
        Prepared.open(tmp_path / "out")
