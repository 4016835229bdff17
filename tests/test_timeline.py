"""Laws of traces and timelines: a file gives back what was written, a figure leaves nothing out and covers nothing."""

import json
import subprocess
import sys
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed.__main__ import main
from minispeed.bands import COLOURS, bands
from minispeed.chrome import from_json, read_trace, to_json, write_trace
from minispeed.collective.group import SoloGroup
from minispeed.collective.trace import Event, Trace, Traced
from minispeed.errors import UserError
from minispeed.figures import draw_timelines, summary
from minispeed.pipeline.actions import Action, Kind
from minispeed.pipeline.messages import with_messages
from minispeed.pipeline.schedule import SCHEDULES, with_reductions
from minispeed.pipeline.simulate import Cost, simulate
from minispeed.pipeline.timeline import Event as Happening, Timeline
from minispeed.spans import (
    ACTIONS,
    COMPUTE,
    MESSAGES,
    MICRO,
    Row,
    Run,
    Sample,
    Span,
    lanes,
    row_of,
    run_of,
    spans_of_events,
)

moments = st.floats(-1e12, 1e12)
durations = st.floats(0, 1e6)
kinds = st.sampled_from([*COMPUTE, *MESSAGES, "cpu_op", ""])
args = st.dictionaries(st.sampled_from(["micro", "bytes", "peer", "group"]), st.integers() | st.text(max_size=3))
spans = st.builds(Span, kinds, st.text(max_size=5), moments, durations, args)
samples = st.builds(Sample, moments, st.integers(0, 2**60))
whole_times = st.builds(
    lambda kind, at, long: Span(kind, "", at, long, {}), kinds, st.integers(0, 30), st.integers(1, 9)
)


@st.composite
def runs(draw):
    """Draw a run with at least one span."""
    pids = draw(st.lists(st.integers(0, 99) | st.text(max_size=3), min_size=1, max_size=4, unique=True))
    names = st.sampled_from(["", "python"])
    rows = [
        Row(pid, draw(st.lists(spans, max_size=5)), draw(st.lists(samples, max_size=3)), draw(names)) for pid in pids
    ]
    rows[0].spans.append(draw(spans))
    return Run(rows, draw(st.sampled_from(["seconds", "simulated units"])))


@st.composite
def timelines(draw):
    """Draw a simulated schedule, with messages and reductions."""
    name, p, v = draw(st.sampled_from(sorted(SCHEDULES))), draw(st.integers(1, 4)), 1
    if name in ("gpipe", "interleaved"):
        v = draw(st.integers(1, 2))
    m = p * draw(st.integers(1, 2))
    thirds = st.integers(1, 9).map(lambda number: Fraction(number, 3))
    cost = Cost(f=draw(thirds), b=draw(thirds), bi=draw(thirds), bw=draw(thirds), send_f=draw(thirds), reduce=1)
    return simulate(
        with_reductions(with_messages(SCHEDULES[name](p, m, v), cost), each_micro=draw(st.booleans())), cost
    )


@given(runs())
def test_a_file_gives_back_every_run_exactly(run):
    assert from_json(json.loads(json.dumps(to_json(run))), "it") == run


def test_a_file_is_written_whole_and_read_back(tmp_path):
    rows = run_of(simulated("zb_h1"), "seconds").rows
    write_trace(tmp_path / "new" / "run.json", rows)
    assert read_trace(tmp_path / "new" / "run.json") == Run(rows)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]


@given(runs())
def test_what_stands_on_one_track_of_a_viewer_never_overlaps(run):
    events = [event for event in to_json(run)["traceEvents"] if event["ph"] == "X"]
    for one, other in combinations(events, 2):
        if (one["pid"], one["tid"]) == (other["pid"], other["tid"]):
            first, second = sorted((one, other), key=lambda event: (event["ts"], event["dur"]))
            assert first["ts"] + first["dur"] <= second["ts"] + 1e-3


@given(st.lists(whole_times, max_size=12))
def test_the_fewest_lanes_are_used(drawn):
    places = lanes(drawn)
    for is_message in (False, True):
        mine = [(span, lane) for span, (of, lane) in zip(drawn, places) if of == is_message]
        together = [sum(s.start <= at < s.end for s, _ in mine) for at in range(40)]
        assert {lane for _, lane in mine} <= set(range(max(1, *together)))
        assert all((span.kind in MESSAGES) == is_message for span, _ in mine)


@given(timelines())
def test_the_spans_of_a_timeline_are_its_events(timeline):
    run = run_of(timeline, "simulated units")
    assert run.length == pytest.approx(float(timeline.length * MICRO), rel=1e-10)
    assert run.bubble == pytest.approx(float(timeline.bubble), abs=1e-10)
    for rank, row in enumerate(run.rows):
        for span, event in zip(row.spans, timeline.of(rank), strict=True):
            assert (span.args["stage"], span.args["micro"]) == event.action[1:]
            assert span.start == pytest.approx(float(event.start) * MICRO, rel=1e-10)
            assert span.end == pytest.approx(float(event.end) * MICRO, rel=1e-10)
            assert span.kind in COLOURS


def test_every_kind_of_action_and_of_call_has_its_colour():
    group = Traced(SoloGroup(), Trace())
    x = torch.zeros(2)
    for work in (
        group.all_reduce(x),
        group.all_gather(x.clone(), x),
        group.reduce_scatter(x.clone(), x),
        group.all_to_all(x.clone(), x),
        group.broadcast(x, 0),
        group.exchange([(x, 0)], [(x.clone(), 0)]),
    ):
        work.wait()
    calls = spans_of_events(group.trace.events, 0)
    assert {span.kind for span in calls} == set(MESSAGES) and all(span.duration > 0 for span in calls)
    assert {*MESSAGES, *COMPUTE} == set(COLOURS) and set(ACTIONS) == set(get_args(Kind))


def messages_of(row):
    return [(span.kind, span.args.get("peer"), span.args.get("bytes")) for span in row.spans if span.kind in MESSAGES]


def noted(rank, *messages):
    return [Event(kind, "pp", rank, peer, size, size, 1.0, 2.0) for kind, peer, size in messages]


def test_a_message_that_pipeline_and_group_both_noted_is_one_span_with_its_bytes():
    program = [Action("F", 0, 0), Action("SEND_F", 0, 0), Action("RECV_B", 0, 0), Action("B", 0, 0)]
    timeline = Timeline(2, [Happening(0, action, at, at + 1) for at, action in enumerate(program)])
    events = [*noted(4, ("send", 6, 100), ("recv", 6, 200), ("send", 5, 300)), *noted(6, ("recv", 4, 100))]
    row = row_of(4, timeline=timeline, members=(4, 6), events=events)
    assert messages_of(row) == [("send", 6, 100), ("receive", 6, 200), ("send", 5, 300)]
    unequal = row_of(4, timeline=timeline, members=(4, 6), events=noted(4, ("send", 6, 60), ("send", 6, 40)))
    assert messages_of(unequal) == [("send", 6, None), ("receive", 6, None), ("send", 6, 60), ("send", 6, 40)]
    assert messages_of(row_of(4, events=events)) == messages_of(row)


@given(runs())
def test_every_span_is_a_box_and_no_box_covers_another(run):
    laid, rows = bands(run), [row for row in run.rows if row.spans or row.memory]
    above = 0.0
    for band, row in zip(laid, rows, strict=True):
        assert [(box.left, box.width) for box in band.boxes] == [(s.start - run.start, s.duration) for s in row.spans]
        assert all(above <= box.top and box.top + box.height <= band.bottom + 1e-9 for box in band.boxes)
        for one, other in combinations(band.boxes, 2):
            across = min(one.left + one.width, other.left + other.width) - max(one.left, other.left)
            down = min(one.top + one.height, other.top + other.height) - max(one.top, other.top)
            assert across <= 1e-2 or down <= 1e-9
        above = band.bottom


def test_a_box_has_the_colour_of_what_its_rank_did_and_is_lighter_for_a_later_stage():
    for name, stages in (("zb_h1", 1), ("interleaved", 2)):
        run, seen = run_of(simulated(name), "simulated units"), {}
        for row, band in zip(run.rows, bands(run), strict=True):
            for span, box in zip(row.spans, band.boxes, strict=True):
                stage = span.args["stage"] // 4 if span.kind in COMPUTE else 0
                seen.setdefault((span.kind, stage), set()).add(box.colour)
        assert {kind: seen[kind, 0] for kind, _ in seen} == {kind: {COLOURS[kind]} for kind, _ in seen}
        forwards = [seen["forward", stage] for stage in range(stages)]
        assert all(len(colours) == 1 for colours in forwards) and len(set.union(*forwards)) == stages


def test_what_lasts_no_time_takes_no_lane_from_what_starts_with_it():
    assert lanes([Span("receive", "", 0, 5, {}), Span("send", "", 0, 0, {})]) == [(True, 0), (True, 0)]


def simulated(name, **cost):
    cost = Cost(**cost)
    return simulate(with_messages(SCHEDULES[name](4, 8, 2 if name == "interleaved" else 1), cost), cost)


@pytest.fixture
def drawn(monkeypatch):
    """Return the figures that are drawn, and let texts stay texts."""
    pytest.importorskip("matplotlib")
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    monkeypatch.setitem(rcParams, "svg.fonttype", "none")
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *to, **how: (figures.append(self), save(self, *to, **how)))
    return figures


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_figure_shows_each_micro_batch_of_each_rank(name, drawn, tmp_path):
    run = run_of(simulated(name), "simulated units")
    written = draw_timelines(tmp_path / "new" / "x.svg", [("it", run)]).read_text()
    computed = [span for row in run.rows for span in row.spans if span.kind in COMPUTE]
    (axes,) = drawn[0].axes
    assert sorted(text.get_text() for text in axes.texts) == sorted(str(span.args["micro"]) for span in computed)
    assert all(f">{label}<" in written for label in ("forward", "rank 3", "simulated units", summary("it", run)))
    assert summary("gpipe", run_of(simulated("gpipe"), "simulated units")) == (
        "gpipe: 33 simulated units, bubble 27.3%"  # (p - 1) / (m + p - 1) of (m + p - 1) (f + b)
    )


def test_texts_lie_within_their_boxes_and_memory_beside_them(drawn, tmp_path):
    rows = [
        Row(rank, row.spans, [Sample(0, 2 * 10**9), Sample(10 * MICRO, 3 * 10**9 + rank * 10**8)])
        for rank, row in enumerate(run_of(simulated("zb_h1", f=0.6, bw=0.1), "seconds").rows)
    ]
    draw_timelines(tmp_path / "x.png", [("it", Run(rows))])
    (axes,) = drawn[0].axes
    boxes = [path.get_extents(axes.transData) for group in axes.collections[::2] for path in group.get_paths()]
    texts = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert {"peak 3 GB", "peak 3.3 GB"} <= set(texts) and len(axes.lines) == 4
    for text in axes.texts:
        extent = text.get_window_extent()
        within = [
            b for b in boxes if b.x0 <= extent.x0 and extent.x1 <= b.x1 and b.y0 <= extent.y0 and extent.y1 <= b.y1
        ]
        assert within or text.get_text().startswith("peak")


def test_runs_stand_above_each_other_on_scales_of_their_own_or_on_one(drawn, tmp_path):
    slow, fast = (run_of(simulated("1f1b", f=f), "seconds") for f in (2, 1))
    for same_scale in (False, True):
        draw_timelines(tmp_path / "x.svg", [("slow", slow), ("fast", fast)], same_scale=same_scale)
    own, one = ([axes.get_xlim()[1] for axes in figure.axes] for figure in drawn)
    assert own == [44, 33] and one == [44, 44]
    first, second = (axes.get_position() for axes in drawn[0].axes)
    assert first.y0 > second.y1


def test_names_are_drawn_as_they_are(drawn, tmp_path):
    odd = "$\\frac$"  # which matplotlib would read as a formula, and refuse
    draw_timelines(tmp_path / "x.svg", [(odd, Run([Row(0, [Span("forward", "", 0, 1, {"micro": odd})], name=odd)]))])
    assert (tmp_path / "x.svg").read_text().count(f"{odd}<") == 2 and f"{odd}: 1 µs" in drawn[0].axes[0].get_title(
        "left"
    )


@pytest.mark.parametrize(
    "seconds, shown", [(2.5, "2.5 s"), (0.25, "250 ms"), (0.0025, "2.5 ms"), (2.5e-5, "25 µs"), (0, "0 µs")]
)
def test_a_length_is_told_in_the_unit_that_suits_it(seconds, shown):
    run = Run([Row(0, [Span("other", "", 7.0, seconds * MICRO, {})])])
    assert summary("x.json", run) == f"x.json: {shown}"


def test_a_trace_of_another_tool_is_read_and_what_is_left_out_is_counted(tmp_path, capsys):
    events = [
        {"ph": "M", "name": "process_name", "pid": 7, "args": {"name": "python"}},
        {"ph": "X", "ts": 5, "dur": 2, "pid": 7, "tid": "a", "name": "mm"},
        {"ph": "B", "ts": 5, "pid": 7},
        {"ph": "C", "ts": 5, "pid": 7, "name": "memory", "args": {"bytes": "?"}},
    ]
    (tmp_path / "x.json").write_text(json.dumps(events))
    row = Row(7, [Span("", "mm", 5.0, 2.0, {})], name="python")
    assert read_trace(tmp_path / "x.json") == Run([row], left_out={"B": 1, "C": 1})
    assert main(["timeline", str(tmp_path / "x.json")]) == 0
    assert "left out, being no complete events: 1 of ph B, 1 of ph C" in capsys.readouterr().out


X = {"ph": "X", "ts": 1, "dur": 1, "pid": 0}


@pytest.mark.parametrize(
    "content, missing",
    [
        ("hello", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "has no traceEvents"),
        ('{"traceEvents": {}}', "is no list of events"),
        ("[1]", "is no list of events"),
        ("3", "is no list of events"),
        ("[]", "has no complete events (ph X); its phases: none"),
        ('[{"ph": "B"}, {"ph": "E"}]', "has no complete events (ph X); its phases: B, E"),
        (json.dumps([X, {**X, "dur": None}]), "event 2 of x.json has no dur"),
        (json.dumps([{**X, "ts": "now"}]), 'event 1 of x.json has "now" for its ts'),
        (json.dumps([{**X, "ts": float("nan")}]), "event 1 of x.json has NaN for its ts"),
        (json.dumps([{**X, "ts": 10**400}]), "event 1 of x.json has 1000"),
        (json.dumps([{**X, "dur": -1}]), "event 1 of x.json lasts -1 microseconds"),
        (json.dumps([{**X, "pid": True}]), "event 1 of x.json has no pid"),
        (json.dumps([{**X, "args": 3}]), "event 1 of x.json has args that are no object"),
    ],
)
def test_a_file_that_is_no_trace_is_told_what_it_lacks(content, missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_trace(Path("x.json"))
    assert missing in caught.value.what and caught.value.fix


@pytest.mark.parametrize(
    "words, said",
    [
        ("", "needs a trace file or a --schedule"),
        ("--ranks 3", "needs a trace file or a --schedule"),
        ("run.json --schedule 1f1b", "--schedule would simulate, but run.json is a file to read"),
        ("run.json --micros 2 --cost-f 1", "--micros, --cost-f would simulate, but run.json"),
        ("--schedule 1fb1", "one of gpipe, 1f1b, interleaved, zb_h1; got '1fb1'"),
        ("--schedule gpipe --ranks 0", "--ranks must be a whole number, at least 1"),
        ("--schedule 1f1b --virtual 2", "one stage on each rank, not 2"),
        ("--schedule interleaved --micros 6", "in groups of 4"),
        ("--schedule 1f1b --cost-bi 1", "1f1b has no action for --cost-bi"),
        ("--schedule zb_h1 --cost-b 1", "zb_h1 has no action for --cost-b"),
        ("--schedule gpipe --cost-f 1 2", "--cost-f has 2 numbers, but there are 4 stages"),
        ("--schedule gpipe --cost-f 0 --cost-b 0 --out x.svg", "takes no time at all"),
        ("--schedule gpipe --out x.txt", "x.txt does not end like a picture"),
        ("--schedule gpipe --out x", "x.svg"),
    ],
)
def test_what_cannot_be_done_is_said_in_two_lines(words, said, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_trace(Path("run.json"), run_of(simulated("1f1b"), "seconds").rows)
    assert main(["timeline", *words.split()]) == 2
    what, fix = capsys.readouterr().err.splitlines()
    assert said in what + fix and fix.startswith("  try: ")


def test_the_costs_given_are_those_simulated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "--schedule zb_h1 --ranks 2 --micros 2 --cost-f 3 4 --cost-bi 5 --cost-bw 6 --cost-send 0.5 --cost-reduce 7"
    assert main(["timeline", *words.split(), "--trace-out", "x.json"]) == 0
    run, seen = read_trace(Path("x.json")), {}
    for row in run.rows:
        for span in row.spans:
            seen.setdefault((span.kind, span.args["stage"]), set()).add(span.duration / MICRO)
    assert run.unit == "simulated units" and "zb_h1, 2 ranks, 2 micro-batches: " in capsys.readouterr().out
    want = {("forward", 0): {3}, ("forward", 1): {4}} | {("reduce", stage): {7} for stage in (0, 1)}
    want |= {("backward input", stage): {5} for stage in (0, 1)} | {("backward weight", stage): {6} for stage in (0, 1)}
    assert {key: seen[key] for key in want} == want
    assert min(seen["send", 0]) == 0.5


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'minispeed\[figures\]'"):
        draw_timelines(tmp_path / "x.svg", [("it", run_of(simulated("1f1b"), "seconds"))])


def test_the_command_answers_without_torch():
    words = ["timeline", "--schedule", "1f1b"]
    program = f"import sys; from minispeed.__main__ import main; main({words}); assert 'torch' not in sys.modules"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stdout) == (0, "1f1b, 4 ranks, 8 micro-batches: 33 simulated units, bubble 27.3%\n")
