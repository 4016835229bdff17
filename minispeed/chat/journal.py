"""Write down and say what happens in a run: lines on the screen, lines in its files, a progress bar.

Only one rank has a voice: the others call the same functions, and nothing comes of it.
"""

import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minispeed import checkpoint
from minispeed.chat.evaluate import Loss
from minispeed.chat.prepared import Prepared
from minispeed.chat.run import RunDirectory
from minispeed.chat.score import Answered
from minispeed.chat.sft_options import SftOptions
from minispeed.engine import Report
from minispeed.errors import UserError
from minispeed.figures import draw_run
from minispeed.options import to_json

METRICS, SAMPLES, PROMPTS = "metrics.jsonl", "samples.jsonl", "prompts.jsonl"


class Journal:
    """The screen and the files of a run, for the rank that has a voice; for the others nothing."""

    def __init__(self, run: RunDirectory, *, is_heard: bool) -> None:
        self.run, self.is_heard = run, is_heard
        self.bar = tqdm(disable=True)
        self.mfu: Callable[[Report, float], float] = lambda report, seconds: 0.0  # 0: nobody knows
        self.used: list[float] = []  # the MFU of each step
        self.waiting: list[tuple[str, dict[str, Any]]] = []  # lines that the disk had no room for

    def say(self, text: str) -> None:
        """Print, without breaking the progress bar."""
        if self.is_heard:
            self.bar.write(text) if not self.bar.disable else print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print what somebody should look at, where errors are printed."""
        if self.is_heard:
            self.bar.write(text, file=sys.stderr) if not self.bar.disable else print(text, file=sys.stderr, flush=True)

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a line to a .jsonl file of the run; while the disk is full, lines wait for the next one that fits."""
        if not self.is_heard:
            return
        was_waiting = bool(self.waiting)
        self.waiting.append((name, record))
        while self.waiting:
            path = self.run.path / self.waiting[0][0]
            size = path.stat().st_size if path.exists() else 0
            try:
                self.run.append(*self.waiting[0])
            except OSError as error:
                if path.exists():
                    os.truncate(path, size)  # no half a line
                if not was_waiting:
                    self.warn(f"could not write {path}: {error.strerror}; its lines wait until there is room")
                return
            del self.waiting[0]

    def write_page(self, name: str, make: Callable[[], str]) -> None:
        """Write a file of the run anew; on a full disk the page before stays."""
        if self.is_heard:
            try:
                checkpoint.write_whole(self.run.path / name, lambda path: path.write_text(make(), encoding="utf-8"))
            except UserError as error:
                self.warn(error.what)

    def forget_after(self, step: int) -> None:
        """Drop the lines that a run resumed at `step` writes again, and lines cut short.

        What is due after an update comes after the checkpoint, so all but the line of the update itself is written
        again; -1 drops everything.
        """
        for name in (METRICS, SAMPLES, PROMPTS) if self.is_heard else ():
            path = self.run.path / name
            if path.exists():
                stays = [r for r in records(path) if r["step"] < step or (r["step"] == step and "norm" in r)]
                text = "".join(json.dumps(record) + "\n" for record in stays)
                checkpoint.write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))

    def first_losses(self) -> dict[str, float]:
        """Return the losses of the untrained model, nats per token, by held-out file; empty if none were measured."""
        lines = records(self.run.path / METRICS)
        return next((dict(line["eval_files"]) for line in lines if line["step"] == 0), {})

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
        self.used.append(self.mfu(report, seconds))
        used = f", MFU {self.used[-1]:.1%}" if self.used[-1] else ""
        self.bar.set_postfix_str(f"loss {report.loss:.3f}, {rate:,.0f} tokens/s{used}", refresh=False)
        self.bar.update()

    def close(self, step: int, seconds: float) -> None:
        """Draw what was written down, and say how long it took and where it is; `seconds` of training."""
        if not self.is_heard:
            return
        metrics, samples = self.run.records(METRICS), self.run.records(SAMPLES)
        for path in draw_run(self.run.path, metrics, samples):
            self.say(f"drawn: {path}")
        rate = statistics.median(record["tokens_per_second"] for record in metrics if "norm" in record)
        used = statistics.median(self.used) if self.used else 0.0
        told = f", MFU {used:.1%}" if used else ""
        self.say(f"{step} steps, {seconds:.0f} s, {rate:,.0f} tokens/s{told}; the model is {self.run.path}")
        self.say(f"talk to it: minispeed chat {self.run.path}")


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


def comparison(trained: Loss, untrained: float | None, frequencies: float) -> str:
    """Put the held-out perplexity beside the untrained model's and beside that of token frequencies alone.

    untrained    nats per token, None where that was not measured
    frequencies  nats per token of a model that knows nothing else
    """
    before = "not measured" if untrained is None else f"{math.exp(untrained):,.1f}"
    return (
        f"held-out perplexity {trained.perplexity:.2f} over {trained.tokens:,} tokens "
        f"(untrained {before}, token frequencies alone {math.exp(frequencies):,.1f}), "
        f"{trained.bits_per_byte:.3f} bits per byte"
    )


def before_and_after(losses: Mapping[str, Loss], untrained: Mapping[str, float]) -> str:
    """Lay out the loss of each held-out file, nats per token, before and after training: one that rose was forgotten.

    untrained  may lack files, or be empty: then there is a dash
    """
    width = max(13, *map(len, losses))
    lines = [f"{'held-out file':{width}}  {'tokens':>9}  before  after  change"]
    for name, loss in losses.items():
        before, after = untrained.get(name), loss.per_token
        beside = (
            f"{'-':>6}  {after:5.3f}  {'-':>6}"
            if before is None
            else f"{before:6.3f}  {after:5.3f}  {after - before:+6.3f}"
        )
        lines.append(f"{name:{width}}  {loss.tokens:9,}  {beside}")
    return "\n".join(lines)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a .jsonl file, without those cut short; nothing where there is no file."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _one_line(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
