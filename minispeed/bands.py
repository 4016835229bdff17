"""Lay out what each rank did when, for a figure: which box lies where, how large, in which colour. Arithmetic only.

A rank is a band: lanes for what it computed, below them thin ones for what it said, below them its memory.

Colours that stay apart for colour-blind readers: Okabe & Ito 2008. https://jfly.uni-koeln.de/color/
"""

from typing import NamedTuple

from minispeed.spans import COMPUTE, Row, Run, Sample, Span, lanes

COLOURS = {  # of what ranks do, in the order of the legend
    "forward": "#0072b2",
    "backward": "#e69f00",
    "backward input": "#d55e00",
    "backward weight": "#009e73",
    "send": "#cc79a7",
    "receive": "#882255",
    "reduce": "#f0e442",
    "gather": "#999933",
    "all to all": "#56b4e9",
    "broadcast": "#aa9977",
}
OTHER, OTHERS = "other", "#c0c0c0"
LANE, THIN_LANE, MESSAGE_LANE, MEMORY, GAP = 0.30, 0.14, 0.09, 0.24, 0.10  # inches


class Box(NamedTuple):
    """One span as it is drawn: microseconds from the start across, inches from the top down."""

    left: float
    top: float
    width: float
    height: float
    colour: str
    text: str


class Band(NamedTuple):
    """One rank as it is drawn, inches from the top; its memory, if any, fills the last inches above `bottom`."""

    label: str
    middle: float
    bottom: float
    boxes: list[Box]
    memory: list[Sample]


def bands(run: Run) -> list[Band]:
    """Lay the ranks out below each other; those of which nothing is known are left out."""
    laid: list[Band] = []
    for row in run.rows:
        if row.spans or row.memory:
            laid.append(_band(row, laid[-1].bottom + GAP if laid else 0.0, run.start))
    return laid


def _band(row: Row, top: float, start: float) -> Band:
    """Lay out one rank: lanes for what it computed, below them those for what it said, below them its memory."""
    places = lanes(row.spans)
    computing, speaking = (
        1 + max((lane for of, lane in places if of == is_message), default=-1) for is_message in (False, True)
    )
    lane_height = LANE if computing == 1 else THIN_LANE
    middle = top + computing * lane_height
    tops = {False: (top, lane_height), True: (middle, MESSAGE_LANE)}
    stages = sorted({stage for span in row.spans if (stage := stage_of(span)) is not None})
    boxes = []
    for span, (is_message, lane) in zip(row.spans, places):
        first, height = tops[is_message]
        stage = stage_of(span)
        nth = 0.0 if stage is None else stages.index(stage) / len(stages)
        colour = lightened(COLOURS.get(span.kind, OTHERS), nth)
        text = str(span.args.get("micro", "")) if span.kind in COMPUTE else ""
        boxes.append(Box(span.start - start, first + lane * height, span.duration, height, colour, text))
    bottom = middle + speaking * MESSAGE_LANE + MEMORY * bool(row.memory)
    memory = [Sample(at - start, size) for at, size in sorted(row.memory)]
    return Band(row.label, (top + middle) / 2, bottom, boxes, memory)


def stage_of(span: Span) -> int | None:
    """Return the stage for which a span computes, where it says one."""
    stage = span.args.get("stage")
    return stage if span.kind in COMPUTE and type(stage) is int else None


def lightened(colour: str, share: float) -> str:
    """Return a colour on its way to white; 0 is the colour itself."""
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)
