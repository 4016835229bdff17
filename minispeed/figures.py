"""Draw what a run wrote down. Needs matplotlib (extra `figures`).

draw_run         a run's losses and skills; without matplotlib nothing is drawn and nothing fails
draw_timelines   what each rank did when, one run above the other; without matplotlib that is said
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minispeed.bands import COLOURS, LANE, MEMORY, OTHER, OTHERS, Band, Box, bands, lightened, stage_of
from minispeed.errors import UserError
from minispeed.spans import MICRO, Row, Run

Records = Sequence[Mapping[str, Any]]
GREY = "#8a8a8a"  # readable on light and on dark pages


def draw_run(folder: Path, metrics: Records, samples: Records) -> list[Path]:
    """Draw loss.svg and, where answers were sampled, skills.svg; return the paths drawn."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("agg")
    drawn = []
    if any("loss" in record for record in metrics):
        drawn.append(draw_loss(folder / "loss.svg", metrics))
    if samples:
        drawn.append(draw_skills(folder / "skills.svg", samples))
    return drawn


def draw_loss(path: Path, metrics: Records) -> Path:
    """Draw the loss of every step and of every evaluation, nats per supervised token."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    steps = [r for r in metrics if "loss" in r]
    evaluations = [r for r in metrics if "eval_loss" in r]
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], lw=0.8, label="training")
    axes.plot([r["step"] for r in evaluations], [r["eval_loss"] for r in evaluations], "o-", ms=4, label="held out")
    axes.set(xlabel="step", ylabel="nats per supervised token", yscale="log")
    return _finish(figure, axes, path)


def draw_skills(path: Path, samples: Records) -> Path:
    """Draw the share of right answers as a map: a row per task, a column per step at which prompts were answered."""
    from matplotlib import pyplot

    right: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        right[sample["task"]][sample["step"]].append(sample["right"])
    steps = sorted({sample["step"] for sample in samples})
    shares = [[_percent(by_step[step]) for step in steps] for by_step in right.values()]
    figure, axes = pyplot.subplots(figsize=(1.8 + 0.75 * len(steps), 0.6 + 0.3 * len(right)))
    axes.imshow(shares, cmap="YlGn", vmin=0, vmax=100, aspect="auto")
    for row, row_shares in enumerate(shares):
        for column, share in enumerate(row_shares):
            colour = "white" if share > 65 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(steps)), [str(step) for step in steps])
    axes.set_yticks(range(len(right)), list(right))
    axes.set(xlabel="step", title="right answers, %")
    axes.title.set(color=GREY, fontsize=9)
    return _finish(figure, axes, path)


def _percent(right: Sequence[bool]) -> float:
    return 100 * sum(right) / max(1, len(right))


def _finish(figure: Any, axes: Any, path: Path) -> Path:
    """Style for light and dark pages, save, close."""
    from matplotlib import pyplot

    axes.tick_params(colors=GREY, which="both")
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(GREY)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=GREY, fontsize=8)
    figure.savefig(path, transparent=True, bbox_inches="tight")
    pyplot.close(figure)
    return path


UNITS = {"s": MICRO, "ms": 1000, "µs": 1}  # microseconds
WIDTH = 9.5  # inches
HEAD, FOOT, LEGEND = 0.30, 0.44, 0.24  # inches above and below a panel, and for the legend
DIGIT = 0.075  # inches that a digit in a box takes


def draw_timelines(path: Path, runs: Sequence[tuple[str, Run]], *, same_scale: bool = False) -> Path:
    """Draw runs one above the other: a row a rank, boxes for what it computed, thin ones for what it said.

    runs        each with its title
    same_scale  whether an inch is the same time in all of them; one unit of a simulation counts as a second
    Writes      path, in the format that its ending names: svg, png, pdf
    Raises      UserError without matplotlib, for another ending, or where a run takes no time
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib", fix="python -m pip install 'minispeed[figures]'") from None
    for title, run in runs:
        if not run.length:
            raise UserError(
                f"{title} takes no time at all: there is nothing to draw",
                fix="a cost above 0, or a run that was traced",
            )
    panels = [bands(run) for _, run in runs]
    height = LEGEND + sum(HEAD + panel[-1].bottom + FOOT for panel in panels)
    figure = Figure(figsize=(WIDTH, height))
    if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{path} does not end like a picture", fix=f"{path.with_suffix('.svg')}")
    longest, below = max(run.length for _, run in runs), height
    for (title, run), panel in zip(runs, panels):
        below -= HEAD + panel[-1].bottom
        axes = figure.add_axes((0, below / height, 1, panel[-1].bottom / height))
        _draw_panel(axes, title, run, panel, longest if same_scale else run.length)
        below -= FOOT
    _add_legend(figure, [row for _, run in runs for row in run.rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, bbox_inches="tight")
    return path


def summary(title: str, run: Run) -> str:
    """Return the line above a figure: length, and bubble where ranks compute."""
    scale, unit = _unit_of(run)
    bubble = "" if run.bubble is None else f", bubble {run.bubble:.1%}"
    return f"{title}: {run.length / scale:.4g} {unit}{bubble}"


def _draw_panel(axes: Any, title: str, run: Run, panel: Sequence[Band], width: float) -> None:
    """Draw one run on axes whose y is inches; `width` is what they show, microseconds."""
    scale, unit = _unit_of(run)
    peak = max((sample.bytes for band in panel for sample in band.memory), default=0)
    axes.set(xlim=(0, width / scale), ylim=(panel[-1].bottom, 0), xlabel=unit)
    for band in panel:
        _draw_boxes(axes, band.boxes, scale, WIDTH / width)
        if band.memory:
            _draw_memory(axes, band, scale, run.length, peak)
    axes.set_yticks([band.middle for band in panel], [band.label for band in panel], parse_math=False)
    axes.set_title(summary(title, run), color=GREY, fontsize=9, loc="left", parse_math=False)
    axes.tick_params(colors=GREY, labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.label.set(color=GREY, fontsize=8)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set(color=GREY, position=("outward", 3))


def _draw_boxes(axes: Any, boxes: Sequence[Box], scale: float, inches: float) -> None:
    """Draw boxes with their texts where these fit; `inches` to a microsecond."""
    from matplotlib.collections import PolyCollection

    corners = ((0, 0), (0, 1), (1, 1), (1, 0))
    shapes = [[((b.left + x * b.width) / scale, b.top + y * b.height) for x, y in corners] for b in boxes]
    edges = [0.4 if b.width * inches > 0.03 else 0.0 for b in boxes]
    colours = [b.colour for b in boxes]
    axes.add_collection(PolyCollection(shapes, facecolors=colours, edgecolors=GREY, linewidths=edges))
    needed = DIGIT * max((len(b.text) for b in boxes), default=0)
    for b in boxes:
        if b.text and b.width * inches >= needed and b.height == LANE:
            x, y = (b.left + b.width / 2) / scale, b.top + b.height / 2
            axes.text(
                x, y, b.text, ha="center", va="center_baseline", fontsize=7, color=_ink(b.colour), parse_math=False
            )


def _draw_memory(axes: Any, band: Band, scale: float, end: float, peak: int) -> None:
    """Draw one rank's memory as steps, the highest of all ranks as high as its place."""
    times = [sample.at / scale for sample in band.memory]
    levels = [band.bottom - 0.9 * MEMORY * sample.bytes / max(peak, 1) for sample in band.memory]
    times, levels = [*times, max(times[-1], end / scale)], [*levels, levels[-1]]
    axes.fill_between(times, levels, band.bottom, step="post", color=GREY, alpha=0.25, lw=0)
    axes.step(times, levels, where="post", color=GREY, lw=0.8)
    most = max(sample.bytes for sample in band.memory)
    text = f"peak {_bytes(most)}"
    axes.annotate(text, (1, band.bottom), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                  fontsize=7, color=GREY, annotation_clip=False)  # fmt: skip


def _add_legend(figure: Any, rows: Sequence[Row]) -> None:
    """Say below the panels what the colours mean that are there."""
    from matplotlib.patches import Patch

    there = {span.kind if span.kind in COLOURS else OTHER for row in rows for span in row.spans if span.duration}
    known = {**COLOURS, OTHER: OTHERS}
    handles = [Patch(facecolor=known[kind], edgecolor=GREY, lw=0.4, label=kind) for kind in known if kind in there]
    if any(len({stage_of(span) for span in row.spans} - {None}) > 1 for row in rows):
        handles.append(Patch(facecolor=lightened(COLOURS["forward"], 0.5), label="lighter: a later stage of the rank"))
    if any(row.memory for row in rows):
        handles.append(Patch(facecolor=GREY, alpha=0.4, label="memory"))
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 0), borderaxespad=0, ncols=len(handles),
                  frameon=False, labelcolor=GREY, fontsize=8, handlelength=1, columnspacing=1.2)  # fmt: skip


def _unit_of(run: Run) -> tuple[float, str]:
    """Return the unit that suits a run's length: microseconds, and its name."""
    if run.unit != "seconds":
        return MICRO, run.unit
    return next(((size, name) for name, size in UNITS.items() if run.length >= size), (1, "µs"))


def _bytes(size: float) -> str:
    name = "B"
    for larger in ("kB", "MB", "GB"):
        if size >= 1000:
            size, name = size / 1000, larger
    return f"{size:.3g} {name}"


def _ink(colour: str) -> str:
    """Return what is readable on a colour: black or white."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "white"
