"""Save a figure as every topic's are: grey axes, readable on light and on dark pages, the same bytes each time."""

from pathlib import Path
from typing import Any

import matplotlib

from minispeed.figures import GREY


def save(figure: Any, path: Path) -> None:
    """Make what surrounds the figure's axes grey, their legends too, and save it in the format of its ending."""
    for axes in figure.axes:
        axes.tick_params(colors=GREY, which="both", labelsize=8)
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
            text.set(color=GREY, fontsize=9)
        for side, spine in axes.spines.items():
            spine.set(color=GREY, visible=side in ("left", "bottom"))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, labelcolor=GREY, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, transparent=True, bbox_inches="tight", metadata=metadata)
