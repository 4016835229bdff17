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
    """Draw the share of right answers per task over the steps at which prompts were answered."""
    from matplotlib import pyplot

    right: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        right[sample["task"]][sample["step"]].append(sample["right"])
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    styles = ("-", "--", ":")
    for index, (task, by_step) in enumerate(right.items()):
        steps = sorted(by_step)
        shares = [100 * sum(by_step[s]) / len(by_step[s]) for s in steps]
        axes.plot(steps, shares, styles[index // 10 % 3], marker="o", ms=3, lw=1.2, label=task)
    axes.set(xlabel="step", ylabel="right answers, %", xscale="log", ylim=(-3, 103))
    axes.set_xticks(steps, [str(s) for s in steps])
    axes.minorticks_off()
    return _finish(figure, axes, path, outside=True)


def _finish(figure: Any, axes: Any, path: Path, *, outside: bool = False) -> Path:
    """Style for light and dark pages, save, close."""
    from matplotlib import pyplot

    axes.tick_params(colors=GREY, which="both")
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(GREY)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if outside else {}
    axes.legend(frameon=False, labelcolor=GREY, fontsize=8, **place)
    figure.savefig(path, transparent=True, bbox_inches="tight")
    pyplot.close(figure)
    return path
