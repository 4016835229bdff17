"""The book is true: nothing woven is stale, every claim holds, every solution keeps the laws, and no stub does."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tutorials"))

import book
import examiner
import experiment
import learn
import weave

CHAPTERS = book.chapters()
EACH = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
FIRST = CHAPTERS[0]
FORM = ("Question", "Guess", "The smallest idea", "Build", "Run", "See", "Break it", "Exercise", "In DeepSpeed",
        "Takeaway", "Papers")  # fmt: skip


def test_nothing_in_the_book_is_stale_broken_or_false():
    assert list(weave.check()) == []


@EACH
def test_a_lesson_has_the_form_and_its_length(chapter):
    lines = chapter.lesson.read_text().splitlines()
    heads = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert tuple(heads) == FORM
    assert 150 <= len(lines) <= 300


@EACH
def test_a_quick_run_ends_and_writes_nothing(chapter):
    before = {path: path.read_bytes() for path in chapter.folder.rglob("*.*") if path.is_file()}
    command = [sys.executable, str(chapter.folder / "run.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert all(path.read_bytes() == content for path, content in before.items() if path.suffix != ".pyc")


@EACH
def test_the_solution_keeps_every_law_and_the_stubs_keep_none(chapter, pytestconfig):
    examples, tried = pytestconfig.getoption("--examples"), examiner.laws_of(chapter.module("test_exercise"))
    assert tried
    for law in tried:
        assert law.check(chapter.module("solution"), examples=examples).kind == "holds", law.sentence
        assert law.check(chapter.module("exercise"), examples=examples).kind == "unwritten", law.sentence
        assert len(law.hints) == learn.HINTS


# ---- what weaving notices, each on a lesson that was true

WRONG = {
    "a stale excerpt": ("```python\n", "```python\n# another line\n", "stale"),
    "a number by hand": ("## Takeaway", "It takes 12.5 MB.\n\n## Takeaway", "no run made: '12.5 MB'"),
    "an altered number": (" MB<!-- end -->", "1 MB<!-- end -->", "stale"),
    "an unknown symbol": ("<!-- code run:", "<!-- code run:no_", "has no no_"),
    "an unknown module": ("<!-- code run:", "<!-- code ran:", "no module ran"),
    "an excerpt too long": ("<!-- code run:train_step -->", "<!-- code minispeed.engine:Engine -->", "at most 25"),
    "an unknown value": ("<!-- number peak.total ", "<!-- number peak.totals ", "no value peak.totals"),
    "an unknown format": ("<!-- number peak.total MB", "<!-- number peak.total miles", "written as 'miles'"),
    "a comment in front": ("<!-- number peak.total", "\n<!-- number peak.total", "taken for HTML"),
    "a claim left out": ("The states do not change", "The states change", "does not make: The states do not"),
}


@pytest.mark.parametrize("old, new, says", WRONG.values(), ids=WRONG)
def test_weaving_notices(old, new, says):
    text = FIRST.lesson.read_text()
    assert old in text
    found = list(weave.problems(FIRST, text.replace(old, new, 1), FIRST.results))
    assert any(says in problem for problem in found), found


def test_a_claim_that_the_results_do_not_bear_out_is_false():
    results = FIRST.results
    results["values"]["course"][3]["measured"]["activations"] += 1
    found = list(weave.false_claims(FIRST, FIRST.lesson.read_text(), results))
    assert found == ["false: At every boundary between two layers the prediction is exact, to the byte."]


@pytest.mark.parametrize("link", ["nowhere.md", "../../..", "README.md#no-heading", "#nor-here"])
def test_a_link_that_leads_nowhere_is_found(link):
    assert list(weave.broken_links(f"[here]({link}) and [there](run.py#L1)", FIRST.lesson)) == [link]


def test_weaving_again_changes_nothing_and_mends_what_was_emptied():
    text = FIRST.lesson.read_text()
    emptied = weave.WOVEN.sub(lambda found: f"<!-- {found[1]}{found[2]} --><!-- end -->", text)
    assert emptied != text
    assert weave.weave(emptied, FIRST, FIRST.results) == text


def test_a_changed_source_is_a_notice_that_names_chapter_and_file(tmp_path):
    copy = book.Chapter(tmp_path / FIRST.name)
    copy.folder.mkdir()
    results = FIRST.results
    results["measured"] = {"README.md": "another hash", **book.hashes(["Makefile"])}
    (copy.folder / "results.json").write_text(json.dumps(results))
    (notice,) = weave.changed(copy)
    assert notice == f"measure {FIRST.name} again (make book CHAPTER=00): changed since: README.md"


def test_a_figure_of_other_results_is_stale(tmp_path):
    copy = book.Chapter(tmp_path / FIRST.name)
    (copy.folder / "figures").mkdir(parents=True)
    for path in [*FIRST.folder.glob("*.py"), *FIRST.folder.glob("figures/*")]:
        (copy.folder / path.relative_to(FIRST.folder)).write_bytes(path.read_bytes())
    for values, stale in ((FIRST.results["values"], []), ({}, list(FIRST.module("run").EXPERIMENT.figures))):
        (copy.folder / "results.json").write_text(json.dumps({"values": values}))
        assert list(weave.stale_figures(copy)) == stale


# ---- what the reader is told


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder of the reader's own."""
    monkeypatch.setattr(book, "MINE", tmp_path)
    yield tmp_path / FIRST.name / "exercise.py"


def said(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    """Return learn.py's exit code and words."""
    monkeypatch.setattr(sys, "argv", ["learn.py", *words])
    code = learn.main()
    return code, capsys.readouterr().out


def test_a_stub_is_copied_once_and_called_unwritten(mine, monkeypatch, capsys):
    code, words = said(monkeypatch, capsys, "00")
    assert (code, mine.read_bytes()) == (1, (FIRST.folder / "exercise.py").read_bytes())
    assert "0 of 4 laws hold" in words
    assert "not written  count_parameters counts what the model really has" in words
    assert "Your copy is" in words and "Traceback" not in words
    mine.write_text(mine.read_text() + "# mine\n")
    assert "Your copy is" not in said(monkeypatch, capsys, "00")[1]
    assert mine.read_text().endswith("# mine\n")


def test_a_wrong_answer_is_shown_on_its_smallest_input(mine, monkeypatch, capsys):
    mine.parent.mkdir()
    right = (FIRST.folder / "solution.py").read_text()
    mine.write_text(right.replace("norm = 2 * D\n", "norm = D\n"))  # the biases of the norms forgotten
    code, words = said(monkeypatch, capsys, "00")
    assert code == 1
    smallest = "layers 1, model_dim 1, key_heads 1, shares 2, head_dim 4, hidden 1, vocabulary 1"
    assert f"BROKEN       count_parameters counts what the model really has\n    smallest input  {smallest}" in words
    assert "expected        34\n    found           31" in words
    assert words.count("BROKEN") == 1 and words.count("not tried") == 3
    assert "Traceback" not in words and "Falsifying" not in words
    assert "Traceback" in said(monkeypatch, capsys, "00", "-v")[1]


def test_an_error_in_the_readers_code_is_named_with_its_line(mine, monkeypatch, capsys):
    mine.parent.mkdir()
    mine.write_text("def count_parameters(config):\n    return config.vocab_size / 0\n")
    words = said(monkeypatch, capsys, "00")[1]
    assert "raised          in count_parameters, line 2: ZeroDivisionError" in words
    mine.write_text("def count_parameters(config:\n")
    with pytest.raises(SystemExit, match="does not run: SyntaxError"):
        learn.main()


def test_hints_go_from_a_nudge_to_the_answer_and_end_when_all_is_done(mine, monkeypatch, capsys):
    words = [said(monkeypatch, capsys, "00", "--hint", number)[1] for number in ("1", "2", "3")]
    first = examiner.laws_of(FIRST.module("test_exercise"))[0]
    assert all(hint in text for hint, text in zip(first.hints, words))
    mine.write_bytes((FIRST.folder / "solution.py").read_bytes())
    assert said(monkeypatch, capsys, "00", "--hint") == (
        0,
        "00-one-step: every law holds; there is nothing to hint at.\n",
    )


def test_the_map_says_what_is_done_and_what_comes_next(mine, monkeypatch, capsys):
    code, words = said(monkeypatch, capsys)
    assert (code, f"{FIRST.name:20} not begun" in words) == (0, True)
    assert f"next: read tutorials/{FIRST.name}/README.md, then python tutorials/learn.py 00" in words
    mine.parent.mkdir()
    mine.write_bytes((FIRST.folder / "solution.py").read_bytes())
    assert "changed, not tried" in said(monkeypatch, capsys)[1]
    assert said(monkeypatch, capsys, "0")[0] == 0
    words = said(monkeypatch, capsys)[1]
    assert f"{FIRST.name:20} done" in words and f"read tutorials/{FIRST.name}" not in words


def test_a_run_with_the_readers_code_says_what_is_missing(mine, monkeypatch):
    run = FIRST.module("run")
    monkeypatch.setattr(sys, "argv", ["run.py", "--mine", "--quick"])
    with pytest.raises(SystemExit, match="nothing of yours yet: python tutorials/learn.py 00"):
        run.EXPERIMENT.main(run.__file__)
    mine.parent.mkdir()
    mine.write_bytes((FIRST.folder / "exercise.py").read_bytes())
    with pytest.raises(SystemExit, match="is not written yet: python tutorials/learn.py 00"):
        run.EXPERIMENT.main(run.__file__)


def test_the_readers_code_is_judged_by_the_lessons_sentences(capsys):
    run, results = FIRST.module("run"), FIRST.results
    run.EXPERIMENT.judge(results)
    assert "every sentence" in capsys.readouterr().out
    results["values"]["sweep"][0]["states"] += 1
    with pytest.raises(SystemExit):
        run.EXPERIMENT.judge(results)
    assert capsys.readouterr().out == "not so with your code: The states do not change with the number of rows.\n"


def test_experiments_start_ranks():
    assert experiment.on_ranks(lambda world, base: base + world.rank, 10, ranks=3) == [10, 11, 12]


def test_a_chapter_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match="no chapter '77' yet; there are 00-one-step"):
        book.find("77")


def test_the_first_chapters_predictions_are_the_librarys_own():
    from minispeed.ledger import Widths, held
    from minispeed.ledger.activations import Case, closed_form
    from minispeed.model.presets import preset

    solution: ModuleType = FIRST.module("solution")
    config, states = preset("nano"), solution.bytes_of_states(preset("nano"))
    ours = held([solution.count_parameters(config)], ranks=1, stage=0, widths=Widths.named("fp32", zero=0))
    assert states == {"parameters": ours.parameters, "gradients": ours.gradients, "optimizer": ours.optimizer}
    assert solution.bytes_kept_by_block(config, 6) == sum(
        closed_form(Case(config=config, b=2, s=3, dtype="fp32")).values()
    )


def test_the_first_chapters_trace_counts_what_is_kept_and_what_is_let_go():
    values = FIRST.module("run").EXPERIMENT.measure(FIRST.module("solution"), True)
    for moment in values["course"]:
        assert moment["measured"] == moment["predicted"], moment["moment"]
    assert [row["counted"] for row in values["sweep"]] == [row["activations, predicted"] for row in values["sweep"]]
    assert values["leak"]["number"] == values["leak"]["no graph"] == [0] * 4
