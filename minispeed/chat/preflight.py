"""Do once, before step 1, all that a run does later: what would fail in hour three fails in the first minute.

    a step forward and backward · a batch of evaluation · an answer · a checkpoint, verified and read back · the disk

Nothing of it is left: gradients are dropped, the checkpoint is removed, parameters, optimizer and the place in the data
are not touched, and nothing is drawn. A run with it is the same, bit for bit, as one without.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minispeed import checkpoint
from minispeed.chat.evaluate import first_of_each_task
from minispeed.chat.examine import Examiner
from minispeed.chat.journal import Journal
from minispeed.chat.saving import CHECKPOINTS
from minispeed.chat.sft_options import SftOptions
from minispeed.checkpoint import Checkpoint, Piece
from minispeed.collective.group import CollectiveError
from minispeed.collective.numbers import any_of, barrier, sums_of
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.runner import MicroBatch

NAME = "pre-flight"
ANSWER = 8  # tokens
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What a run is made of, to be tried out.

    path    the run's directory
    micros  the micro-batches of its first step; all rows are of one length, so no later step is larger
    kept    the most checkpoints that lie on the disk at a time
    """

    engine: Engine
    examiner: Examiner
    journal: Journal
    path: Path
    micros: Sequence[MicroBatch]
    kept: int

    def check(self) -> None:
        """Try everything, and print what took how long.

        Raises  UserError that names what failed, and what may help
        """
        fits = "a smaller --micro-batch, a shorter --seq, or --recompute all"
        checks: dict[str, tuple[Callable[[], str], str]] = {
            "forward and backward": (self._train, fits),
            "evaluation": (self._evaluate, fits),
            "answer": (self._answer, fits),
            "checkpoint": (self._save, "another --out"),
            "disk": (self._weigh, "another --out"),
        }
        self.journal.say("before step 1, all that the run will do is done once:")
        for name, (work, fix) in checks.items():
            start = time.perf_counter()
            with _sentence_for(f"{NAME}, {name}", fix):
                found = work()
            self.journal.say(f"  {name:20}  {time.perf_counter() - start:6.2f} s  {found}")

    def _train(self) -> str:
        """Run the first step's rows forward and backward, and drop the gradients."""
        engine = self.engine
        num_supervised = sum(micro.num_supervised for micro in self.micros)
        (whole,) = sums_of(engine.lines.dp, [num_supervised]).tolist()
        weight = engine.scaler.scale / max(1, whole)
        total = engine.runner.train(self.micros, weight, step=engine.step)
        for part in engine.parts:
            part.sharded.forget()
        loss = sums_of(engine.group, [total]).item() / max(1, whole)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of the first rows is {loss}", fix="--dtype fp32, or a model whose weights are finite"
            )
        rows, seq = self.micros[0].tokens.shape
        return f"{len(self.micros)} x {rows} rows of {seq} tokens, loss {loss:.3f}"

    def _evaluate(self) -> str:
        """Measure the loss of one batch of each held-out file."""
        for rows in self.examiner.held_out.values():
            self.examiner.loss_on(rows, 1)
        return f"a batch of {', '.join(self.examiner.held_out)}" if self.examiner.held_out else "nothing is held out"

    def _answer(self) -> str:
        """Write the beginning of an answer, to the first prompt there is."""
        examiner = self.examiner
        prompts = examiner.prompts or first_of_each_task(examiner.prepared.eval_conversations(), 1)
        if not prompts:
            return "nothing is asked"
        examiner.answers(prompts[:1], most=ANSWER)
        return f"up to {ANSWER} tokens"

    def _save(self) -> str:
        """Write a checkpoint, verify it, compare what it holds with what was written, and remove it."""
        engine, folder = self.engine, self.path / CHECKPOINTS / NAME
        pieces = engine.pieces()
        try:
            checkpoint.save(folder, pieces, {"step": engine.step}, engine.group)
            problems = checkpoint.problems(folder) if engine.group.rank == 0 else []
            problems = problems or _differences(Checkpoint(folder), pieces)
            if any_of(engine.group, bool(problems)):
                what = problems[0] if problems else "another rank read something else than it had written"
                raise UserError(what, fix="another disk")
        finally:
            if engine.group.rank == 0:
                clear(self.path)
        barrier(engine.group)
        return f"{self._bytes_of(pieces) / MB:,.1f} MB written, verified, read back and removed"

    def _weigh(self) -> str:
        """Compare what will lie on the disk at once with what is free."""
        pieces = self.engine.pieces()
        each = self._bytes_of(pieces) + self._bytes_to_come(pieces)
        model = self._bytes_of([piece for piece in pieces if piece.name.startswith("parameters/")])
        there = sum(path.stat().st_size for path in (self.path / CHECKPOINTS).rglob("*") if path.is_file())
        needed, free = self.kept * each + model - there, shutil.disk_usage(self.path).free
        told = f"{self.kept} checkpoints of {each / MB:,.1f} MB and the model, {free / MB:,.0f} MB free"
        if any_of(self.engine.group, needed > free):
            raise UserError(told, fix="free some disk, another --out, or fewer: --keep-last 1, --keep-every 0")
        return told

    def _bytes_of(self, pieces: Sequence[Piece]) -> float:
        """Return the bytes of all ranks' pieces, each counted once."""
        return sums_of(self.engine.group, [sum(p.tensor.nbytes for p in pieces if not p.is_copy)]).item()

    def _bytes_to_come(self, pieces: Sequence[Piece]) -> float:
        """Return the bytes that an optimizer without states yet will add: Adam's two moments of each master."""
        units = [(part, unit) for part in self.engine.parts for unit in part.units if unit.trainable]
        trained = {f"parameters/{part.logical[name].name}" for part, unit in units for name in unit.parameters}
        has_states = any(not piece.name.startswith("parameters/") for piece in pieces)
        mine = 0 if has_states else sum(p.tensor.nbytes for p in pieces if p.name in trained and not p.is_copy)
        return 2 * sums_of(self.engine.group, [mine]).item()


def most_kept(options: SftOptions, total: int) -> int:
    """Return how many checkpoints a run of `total` steps may have on the disk at a time: one more is being written."""
    of_steps = total // options.keep_every if options.keep_every else 0
    return options.keep_last + of_steps + 2  # one may be the best


def clear(path: Path) -> None:
    """Remove what a pre-flight writes in a run's directory, also where it was cut short."""
    folder = path / CHECKPOINTS
    for leftover in (NAME, *(f".{NAME}{end}" for end in checkpoint.LEFTOVERS)):
        checkpoint.remove(folder / leftover)
    with contextlib.suppress(OSError):  # it holds checkpoints, or is not there
        folder.rmdir()


def _differences(stored: Checkpoint, pieces: Sequence[Piece]) -> list[str]:
    """Return the names of this rank's pieces that a checkpoint gives back otherwise, each in a sentence."""
    found = []
    for piece in pieces:
        back = stored.read(piece.name, piece.elements, piece.part)
        if back is None or not torch.equal(back, piece.tensor.detach().flatten().to("cpu")):
            found.append(f"{stored.directory} gives {piece.name} back otherwise than it was written")
    return found


@contextlib.contextmanager
def _sentence_for(name: str, fix: str) -> Iterator[None]:
    """Turn what goes wrong for want of memory or disk into a sentence that says what the run was trying."""
    try:
        yield
    except CollectiveError:
        raise
    except UserError as error:
        raise UserError(f"{name}: {error.what}", fix=error.fix) from error
    except (MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_about_memory(error):
            raise
        (why, *_) = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{name}: {why}", fix=fix) from error


def _is_about_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
