"""Draw what a run wrote down. Needs matplotlib (extra `figures`); without it nothing is drawn and nothing fails."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
