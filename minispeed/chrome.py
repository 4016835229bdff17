"""A run's spans as a file in the Chrome trace format, which opens in https://ui.perfetto.dev and chrome://tracing.

    pid       the rank; a metadata event has its name
    tid       the lane: even where a rank computes, odd where it speaks, so that messages may overlap
    ph X      a span: kind (cat), name, start (ts) and duration (dur) in microseconds, stage, micro, bytes, peer (args)
    ph C      the memory in use, bytes
    otherData what a second of the times means: a second, or one unit of a simulation

Google, Trace Event Format. https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minispeed.errors import UserError
from minispeed.spans import Row, Run, Sample, Span, Unit, lanes

MEMORY = "memory"
LANES = {False: "compute", True: "messages"}
FIX = "a Chrome trace in JSON, such as --trace-out writes"


def write_trace(path: Path, rows: Sequence[Row], unit: Unit = "seconds") -> None:
    """Write the rows of all ranks, gathered on one, to a file; it is whole or not there.

    The rows' clocks must be one: those of several machines are not.
    Raises  UserError if the disk cannot hold it
    """
    from minispeed.checkpoint import write_whole  # torch comes with it, and takes its time

    text = json.dumps(to_json(Run(list(rows), unit)), allow_nan=False)
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_trace(path: Path) -> Run:
    """Read a trace file of any tool that writes complete events; a bare list of events will do.

    Raises  UserError naming what is missing
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}", fix=FIX) from None
    return from_json(content, str(path))


def to_json(run: Run) -> dict[str, Any]:
    """Return a run as the object that its file holds."""
    events = [event for row in run.rows for event in _events(row)]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"tool": "minispeed", "times": run.unit}}


def from_json(content: Any, where: str) -> Run:
    """Return the run of a file's content; `where` is the file's name in errors.

    Raises  UserError naming what is missing
    """
    other: Any = {}
    if isinstance(content, dict):
        if "traceEvents" not in content:
            raise UserError(f"{where} has no traceEvents", fix=FIX)
        content, other = content["traceEvents"], content.get("otherData")
    if not isinstance(content, list) or not all(isinstance(event, dict) for event in content):
        raise UserError(f"{where} is no list of events", fix=FIX)
    return Run(_rows(content, where), _unit(other), _left_out(content, where))


def _events(row: Row) -> list[dict[str, Any]]:
    """Return one rank's events: who it is, its spans, its memory."""
    places = lanes(row.spans)
    tids = [2 * lane + is_message for is_message, lane in places]
    names = {tid: LANES[bool(tid % 2)] + f" {tid // 2}" * (tid > 1) for tid in sorted(set(tids))}
    events: list[dict[str, Any]] = [_named("process_name", row.rank, 0, row.label)]
    events += [_named("thread_name", row.rank, tid, name) for tid, name in names.items()]
    for span, tid in zip(row.spans, tids):
        times = {"ts": span.start, "dur": span.duration}
        where = {"pid": row.rank, "tid": tid}
        events.append({"ph": "X", "name": span.name, "cat": span.kind, **times, **where, "args": dict(span.args)})
    for at, size in row.memory:
        events.append({"ph": "C", "name": MEMORY, "ts": at, "pid": row.rank, "args": {"bytes": size}})
    return events


def _named(what: str, pid: int | str, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _rows(events: Sequence[dict[str, Any]], where: str) -> list[Row]:
    """Sort the events by process, in the order in which these first appear."""
    spans: dict[int | str, list[Span]] = {}
    memory: dict[int | str, list[Sample]] = {}
    names: dict[int | str, str] = {}
    for number, event in enumerate(events, start=1):
        label, pid = f"event {number} of {where}", event.get("pid")
        if event.get("ph") == "M" and event.get("name") == "process_name":
            names[_process(event, label)] = str(_args(event, label).get("name", f"process {pid}"))
        elif event.get("ph") == "X":
            spans.setdefault(_process(event, label), []).append(_span(event, label))
        elif _is_memory(event):
            sample = Sample(_number(event, "ts", label), event["args"]["bytes"])
            memory.setdefault(_process(event, label), []).append(sample)
    return [
        Row(pid, spans.get(pid, []), memory.get(pid, []), _own(pid, names.get(pid, f"process {pid}")))
        for pid in {**names, **spans, **memory}
    ]


def _own(pid: int | str, name: str) -> str:
    """Return the name of a row, "" where it is the one that a rank has anyway."""
    return "" if name == Row(pid, []).label else name


def _span(event: dict[str, Any], label: str) -> Span:
    start, duration = (_number(event, name, label) for name in ("ts", "dur"))
    if duration < 0:
        raise UserError(f"{label} lasts {duration:g} microseconds", fix="a dur of 0 or more")
    return Span(str(event.get("cat", "")), str(event.get("name", "")), start, duration, _args(event, label))


def _is_memory(event: dict[str, Any]) -> bool:
    """Whether an event is a counter of ours."""
    args = event.get("args")
    named = event.get("ph") == "C" and event.get("name") == MEMORY
    return named and isinstance(args, dict) and type(args.get("bytes")) is int


def _process(event: dict[str, Any], label: str) -> int | str:
    pid: Any = event.get("pid")
    if type(pid) not in (int, str):
        raise UserError(f"{label} has no pid", fix="a number or a name of its process")
    process: int | str = pid
    return process


def _number(event: dict[str, Any], name: str, label: str) -> float:
    value: Any = event.get(name)
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        found = "no" if value is None else f"{json.dumps(value)[:40]} for its"
        raise UserError(f"{label} has {found} {name}", fix="a number of microseconds")
    return float(value)


def _args(event: dict[str, Any], label: str) -> dict[str, Any]:
    args = event.get("args", {})
    if not isinstance(args, dict):
        raise UserError(f"{label} has args that are no object", fix='"args": {}, or none at all')
    return args


def _unit(other: Any) -> Unit:
    simulated: Unit = "simulated units"
    return simulated if isinstance(other, dict) and other.get("times") == simulated else "seconds"


def _left_out(events: Sequence[dict[str, Any]], where: str) -> dict[str, int]:
    """Count the events that are not read, by phase; that none is left to draw is an error."""
    phases = Counter(str(event.get("ph")) for event in events if event.get("ph") != "M" and not _is_memory(event))
    if not phases.pop("X", 0):
        found = ", ".join(sorted(phases)) or "none"
        raise UserError(f"{where} has no complete events (ph X); its phases: {found}", fix=FIX)
    return dict(phases)
