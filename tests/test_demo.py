"""The main job, small: every part of it happens, and its tables say what was measured."""

import json
import math
import re

import pytest

from minispeed.__main__ import main
from minispeed.chat.demo import LONGEST_ANSWER, Scores, conclude
from minispeed.chat.proof import ARRANGEMENTS, Outcome, Proof
from minispeed.chat.score import Answered
from minispeed.chat.skills import GROUPS, LIVE_PROMPTS, REFUSAL, SKILLS


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run the demo for a few steps; return its directory and what it printed."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("demo") / "run"
    words = ["demo", "--out", str(out), "--model", "nano", "--steps", "26", "--conversations", "300", "--score", "1"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([*words, "--batch", "2", "--seq", "96", "--dtype", "fp32", "--threads", "1"]) == 0
    return out, said.getvalue()


def test_it_shows_every_part(demo):
    out, said = demo
    for group in GROUPS:
        assert f"\n{group}" in said
    for task in SKILLS:
        assert f"  {task} " in said
    for prompt in LIVE_PROMPTS:
        assert f"you> {prompt}" in said
    assert "untrained" in said and "most similar prompt" in said and "answers that stopped by themselves" in said
    scores = json.loads((out / "scores.json").read_text())
    assert scores["skills"].keys() == {"trained", "untrained", "looked_up"}
    assert set(scores["groups"]) == set(GROUPS)


def test_samples_are_kept_and_drawn(demo):
    out, _ = demo
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {25, 26} and {sample["task"] for sample in samples} == set(SKILLS)
    pytest.importorskip("matplotlib")
    assert (out / "loss.svg").exists() and (out / "skills.svg").exists()


def test_it_ends_with_the_law(demo):
    out, said = demo
    for arrangement in ARRANGEMENTS:
        assert f"\n{arrangement.name}: loss " in said and re.search(
            rf"\n{arrangement.name} +{arrangement.ranks} ", said
        )
    last = re.fullmatch(r"8 ranks, one process, the same model to (\d+) digits", said.splitlines()[-1])
    assert last and int(last[1]) >= 12
    pytest.importorskip("matplotlib")
    assert (out / "timeline.svg").exists() and f"drawn: {out / 'timeline.svg'}" in said


@pytest.mark.parametrize("off, code", [(0.0, 0), (1e-10, 0), (1e-8, 1), (math.nan, 1)])
def test_layouts_that_disagree_are_an_error(off, code, capsys):
    proof = Proof([Outcome(arrangement=ARRANGEMENTS[2], ranks=[], difference=off)])
    assert conclude(proof) == code
    said = capsys.readouterr()
    assert (said.err if code else said.out).splitlines() == ["minispeed: " * code + proof.sentence]
    assert (said.out if code else said.err) == "" and ("the same model" in proof.sentence) == (code == 0)


def test_it_replaces_its_own_directory_and_no_other(demo, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "not a demo's" in capsys.readouterr().err and (tmp_path / "thesis.tex").exists()


def test_scores_are_averaged_group_by_group():
    def answers(wrong: str) -> list[Answered]:
        return [
            Answered(name, skill.metric, "?", "a", "b" if name == wrong else "a", name != wrong)
            for name, skill in SKILLS.items()
        ]

    figures = Scores(answers("sums"), answers(""), answers("capitals")).figures()
    rules = [name for name, skill in SKILLS.items() if skill.group == "rules"]
    memory = [name for name, skill in SKILLS.items() if skill.group == "memory"]
    assert figures["groups"]["rules"]["trained"] == pytest.approx(1 - 1 / len(rules))
    assert figures["groups"]["memory"]["looked_up"] == pytest.approx(1 - 1 / len(memory))
    assert figures["worst_rule"] == 0 and figures["stopped"] == pytest.approx(1 - 1 / len(SKILLS))
    refused = [Answered(name, s.metric, "?", "a", f"{REFUSAL} I can add.", True) for name, s in SKILLS.items()]
    assert Scores(refused, refused, refused).figures()["wrongly_refused"] == 1


def test_every_wanted_answer_fits_the_longest():
    from minispeed.chat.skills import eval_conversations

    for conversation in eval_conversations(20):
        assert len(conversation.turns[-1].text) < LONGEST_ANSWER  # characters, and a token is at least one
