"""Write down and say what happens in a run: lines on the screen, lines in its files, a progress bar.

Only one rank has a voice: the others call the same functions, and nothing comes of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from minispeed.chat.commands import SftOptions
from minispeed.chat.evaluate import Loss
from minispeed.chat.prepared import Prepared
from minispeed.chat.run import RunDirectory
from minispeed.chat.score import Answered
from minispeed.engine import Report
from minispeed.options import to_json

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class Journal:
    """The screen and the files of a run, for the rank that has a voice; for the others nothing."""

    def __init__(self, run: RunDirectory, *, is_heard: bool) -> None:
        self.run, self.is_heard = run, is_heard
        self.bar = tqdm(disable=True)

    def say(self, text: str) -> None:
        """Print, without breaking the progress bar."""
        if self.is_heard:
            self.bar.write(text) if not self.bar.disable else print(text, flush=True)

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a line to a .jsonl file of the run."""
        if self.is_heard:
            self.run.append(name, record)

    def forget_after(self, step: int) -> None:
        """Drop the lines that a run resumed at `step` writes again."""
        for name in (METRICS, SAMPLES) if self.is_heard else ():
            self.run.forget_after(name, step)

    def write_options(self, options: SftOptions, prepared: Prepared) -> None:
        """Write the effective options, with which the run can be repeated."""
        if self.is_heard:
            written = to_json(replace(options, resume=False))
            self.run.write_provenance("sft", written, data_hash=prepared.report["key"], prepared=prepared.folder)

    def start_bar(self, step: int, total: int) -> None:
        """Show a progress bar, if this is a terminal, from `step` on; a `total` of 0 is open."""
        disable = None if self.is_heard else True
        self.bar = tqdm(total=total or None, initial=step, unit="step", disable=disable, leave=False)

    def record_update(self, step: int, report: Report, seconds: float, tasks: Mapping[str, float]) -> None:
        """Write a line of metrics and move the progress bar.

        tasks  nats per supervised token, by task
        """
        rate = report.num_tokens / seconds
        figures = {"step": step, **vars(report), "seconds": seconds, "tokens_per_second": rate}
        self.append(METRICS, {**figures, "tasks": tasks})
        self.bar.set_postfix_str(f"loss {report.loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update()


def transcript(answered: Sequence[Answered]) -> str:
    """Lay out the first answer of each task: a tick or a cross, the task, the prompt, the answer."""
    first: dict[str, Answered] = {}
    for one in answered:
        first.setdefault(one.task, one)
    width = max(map(len, first), default=0)
    return "\n".join(
        f"  {'✓' if one.is_right else '✗'} {task:{width}}  {_one_line(one.prompt, 48)}  ->  {_one_line(one.answer, 70)}"
        for task, one in first.items()
    )


def comparison(trained: Loss, untrained: Loss | None, frequencies: float) -> str:
    """Put the held-out perplexity beside the untrained model's and beside that of token frequencies alone.

    frequencies  nats per token of a model that knows nothing else
    """
    before = "not measured" if untrained is None else f"{untrained.perplexity:,.1f}"
    return (
        f"held-out perplexity {trained.perplexity:.2f} over {trained.tokens:,} tokens "
        f"(untrained {before}, token frequencies alone {math.exp(frequencies):,.1f}), "
        f"{trained.bits_per_byte:.3f} bits per byte"
    )


def _one_line(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
