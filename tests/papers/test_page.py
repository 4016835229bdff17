"""docs/papers.md is what its script makes of the saved results, and nothing that it names is missing."""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from entry import DOCS, SAVED, Entry, Row, difference, figure_path
from hypothesis import given, strategies as st
from page import HEADER, TOPICS, page, spell

REPOSITORY = DOCS.parent
SAVED_TOPICS = sorted(SAVED.glob("*.json"))
WHERE = dict(command="python it.py", date="2026-01-01", torch="2", python="3", device="cpu", cores=2, commit="abc")


def saved(topic: str = "zero", **fields: object) -> dict[str, object]:
    """Return what a topic's file holds."""
    row = Row(claim="a|b", section="section 1", paper=None, closed_form=2, measured=3.5, unit="bytes")
    entry = Entry(topic=topic, title=f"About {topic}", source="Paper, 2020", link="https://example.org", rows=[row])
    return asdict(entry) | WHERE | fields


def write(folder: Path, *entries: dict[str, object]) -> Path:
    for entry in entries:
        (folder / f"{entry['topic']}.json").write_text(json.dumps(entry))
    return folder


def test_the_page_is_what_the_saved_results_make():
    assert (DOCS / "papers.md").read_text() == page()


@pytest.mark.parametrize("file", SAVED_TOPICS, ids=lambda file: file.stem)
def test_a_saved_topic_is_on_the_page_with_its_script_and_its_figure(file):
    entry = json.loads(file.read_text())
    assert entry["topic"] == file.stem and file.stem in TOPICS
    assert entry["rows"] and f"benchmarks/papers/{file.stem}.py" in entry["command"]
    assert (REPOSITORY / "benchmarks/papers" / f"{file.stem}.py").exists()
    assert figure_path(file.stem).exists() == bool(entry["series"])


def test_every_figure_of_the_page_is_there_and_no_other_is():
    named = re.findall(r"\]\((figures/papers-[^)]*)\)", (DOCS / "papers.md").read_text())
    assert {DOCS / name for name in named} == set((DOCS / "figures").glob("papers-*.svg"))


def test_make_papers_runs_the_topics_in_the_order_of_the_page():
    [topics] = re.findall(r"^TOPICS \?= (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert tuple(topics.split()) == TOPICS


def test_no_script_hides_a_module_of_python():
    scripts = {path.stem for path in (REPOSITORY / "benchmarks/papers").glob("*.py")}
    assert not scripts & {*sys.stdlib_module_names, "compression"}


def test_topics_stand_in_their_order_and_a_missing_one_is_left_out(tmp_path):
    made = page(write(tmp_path, saved("lora"), saved("zero"), saved("deep")))
    assert re.findall("^## About (.*)$", made, re.MULTILINE) == ["zero", "lora", "deep"]


def test_a_figure_is_shown_where_there_are_numbers_to_draw(tmp_path):
    assert "![" not in page(write(tmp_path, saved()))
    assert "(figures/papers-zero.svg)" in page(write(tmp_path, saved(series={"x": [1]})))


def test_a_row_has_a_cell_for_each_column_whatever_it_says(tmp_path):
    made = page(write(tmp_path, saved()))
    assert "| a\\|b (section 1) | bytes |  | 2 | 3.5 | 1.5 |" in made
    for line in re.findall(r"^\|.*\|$", made, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", line)) == len(HEADER) + 1


numbers = st.integers(-(10**12), 10**12) | st.floats(-1e6, 1e6)


@given(numbers)
def test_a_number_reads_back_within_a_thousandth(value):
    assert float(spell(value).replace(",", "")) == pytest.approx(value, rel=1e-3, abs=0)


@given(st.integers(-(10**15), 10**15))
def test_a_whole_number_is_spelled_to_its_last_digit(value):
    assert int(spell(value).replace(",", "")) == int(spell(float(value)).replace(",", "")) == value


@given(numbers, numbers)
def test_the_difference_is_measured_less_closed_form(measured, closed_form):
    row = Row(claim="", section="", paper=None, closed_form=closed_form, measured=measured)
    assert row.difference == measured - closed_form
    assert difference("60 to 40", closed_form) is None and difference(measured, None) is None
