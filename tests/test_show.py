"""Laws of showing: all that is said is seen, its kind too, and nothing in a text steers the terminal."""

import re

from hypothesis import given, settings, strategies as st

from minispeed.chat.conversation import Conversation, Turn
from minispeed.chat.show import Entry, Notices, printable, report_text, show
from minispeed.chat.template import Template
from minispeed.chat.tokenizer import ChatTokenizer

TOKENIZER = ChatTokenizer.train(["hello", "there"] * 5, 280)
TEMPLATE = Template()
HELLO = Conversation((Turn("user", "hello"), Turn("assistant", "there")), task="greet")


def body(conversations, **options):
    return show(conversations, TOKENIZER, TEMPLATE, **options).split("\n", 1)[1]


def test_plain_marks_what_is_learnt():
    assert body([HELLO], colour=False) == (
        "\n--- greet: 7 tokens, 2 learnt\n<|bos|><|user|>hello<|end|>\n<|assistant|>[+there+][+<|end|>+]\n"
    )
    assert "<|user|>[+hello+][+<|end|>+]" in body([HELLO], colour=False, train_on="all")


def test_colour_says_the_same_as_plain():
    coloured = body([HELLO], colour=True)
    assert "\x1b[32mthere\x1b[0m\x1b[1;32m<|end|>\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == re.sub(r"\[\+|\+\]", "", body([HELLO], colour=False))


@settings(deadline=None)
@given(st.text(min_size=1, max_size=10))
def test_a_text_cannot_steer_the_terminal(text):
    shown = body([Conversation((Turn("user", text + "\x1b[2J\r\x07"), Turn("assistant", "x")))], colour=False)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]", shown)
    assert printable(text) in shown and r"\x1b[2J\r\x07" in shown


def notices(train, evaluation=()):
    entries = [
        [Entry(Conversation(tuple(turns)), 0, f"x:{i}") for i, turns in enumerate(part, 1)]
        for part in (train, evaluation)
    ]
    return Notices(*entries).found


def exchange(asked="hello", answered="there"):
    return [Turn("user", asked), Turn("assistant", answered)]


def test_clean_conversations_raise_no_notice():
    assert notices([exchange(), [Turn("text", "once")]], [exchange("bye")]) == {}


def test_duplicates_and_prompts_on_both_sides_are_placed():
    found = notices([exchange(), exchange(), exchange("other")], [exchange(answered="you"), exchange("new")])
    assert found["exact duplicates"] == {"count": 1, "where": ["x:2"]}
    assert found["evaluation prompts that are also in training"] == {"count": 1, "where": ["x:1"]}
    assert len(found) == 2


def test_odd_conversations_are_placed_and_the_first_few_named():
    assert notices([[*exchange(), Turn("user", "and?")]]) == {
        "conversations whose last turn is not the assistant's": {"count": 1, "where": ["x:1"]}
    }
    (found,) = notices([exchange(str(i), "...") for i in range(9)]).values()
    assert found == {"count": 9, "where": ["x:1", "x:2", "x:3", "x:4", "x:5"]}
    for leftover in ("### Response:", "[INST]", "[/INST]", "<|im_end|>", "<|im_start|>", "<|eot_id|>"):
        assert list(notices([exchange(answered=f"a {leftover} b")])) == [
            "conversations with leftovers of another template"
        ]


def test_the_report_reads_well():
    part = {
        "files": [
            {
                "name": "a.jsonl",
                "format": "Alpaca",
                "conversations": 3,
                "malformed": 2,
                "malformed_at": [4, 7],
            }
        ],
        **{
            "conversations": 3,
            "turns": 6,
            "tokens": 100,
            "supervised": 25,
            "lengths": {"16": 2, "64": 1},
            "seq": 512,
        },
        "truncated": {"turns": 1, "tokens": 9, "conversations": 1, "dropped": 0},
    }
    report = {"reused": True, "vocabulary": 300, "seq": 512, "train_on": "assistant", "held_out": True,
              "notices": {"exact duplicates": {"count": 7, "where": ["a.jsonl:2"]}},
              "train": {**part, "rows": 1, "waste": 0.125}, "eval": part}  # fmt: skip
    text = report_text(report)
    for line in (
        "already prepared: same data, same options",
        "vocabulary 300, context 512, trained on assistant",
        "  a.jsonl: Alpaca, 3 conversations, 2 malformed left out (line 4, 7)",
        "  3 conversations, 6 turns, 100 tokens, 25 supervised (25.0%)",
        "  longer than the context: 1 conversations cut between turns, 0 dropped whole; "
        "1 answers and 9 supervised tokens lost",
        "  packed into 1 rows of 512, 12.50% padding",
        "eval (held out)",
        "notice: 7 exact duplicates (a.jsonl:2, ...)",
    ):
        assert line in text.split("\n")
    assert not report_text({**report, "reused": False}).startswith("already")
