"""The directory of a run: what it was told, what it did step by step, and the model that came out.

RUN/run.json            the full effective options, the command, versions, hashes of the data
RUN/metrics.jsonl       a line per step and per evaluation
RUN/samples.jsonl       held-out prompts and what the model answered, as it learnt
RUN/data.json           the hash of every data file, and of what was prepared from them
RUN/prompts.jsonl       what was answered to --prompts, and samples.md, the same side by side
RUN/checkpoints/        step-NNNNNNNN/, and the files `last` and `best` that name one each; see `minispeed.checkpoint`
RUN/model.safetensors, config.json, tokenizer.json, template.json    the model: all that `chat` needs
"""

import json
import os
import platform
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minispeed import checkpoint
from minispeed.collective.group import Group
from minispeed.errors import UserError
from minispeed.version import __version__

POINTERS = ("last", "best")  # files in checkpoints/ that hold the name of one


class RunDirectory:
    """Writes and reads the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saver: checkpoint.Saver | None = None

    def check(self, *, resume: bool) -> None:
        """Raise UserError if a run cannot go here: another run, something else, or, to go on, no checkpoint."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file", fix="another --out")
        held = sorted(path.name for path in self.path.iterdir()) if self.path.exists() else []
        foreign = [name for name in held if name not in ("conversations", "tokenised")]  # what a demo starts with
        if resume and not has_checkpoints(self.path):
            raise UserError(f"{self.path} holds no checkpoint to go on from", fix="the command without --resume")
        if resume:
            return
        if has_checkpoints(self.path) or {"run.json", "model.safetensors"} <= set(held):
            raise UserError(f"{self.path} already holds a run", fix="--resume to go on, or another --out")
        if foreign and "run.json" not in held:  # else it was lost before its first checkpoint, and begins anew
            raise UserError(f"{self.path} holds {foreign[0]}, which is no run's", fix="another --out")

    def create(self, *, resume: bool) -> None:
        """Make the directory, after `check`.  Raises UserError if it cannot be made"""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be made: {error.strerror}", fix="another --out") from error
        if not resume:
            for name in ("metrics.jsonl", "samples.jsonl"):
                (self.path / name).unlink(missing_ok=True)

    def write_provenance(self, command: str, options: dict[str, Any], *, data_hash: str, prepared: Path) -> None:
        """Write run.json: the options as a block that `--config` reads, and where the run came from.

        data_hash  of the contents of all data files and of how they were tokenised, into the folder `prepared`
        """
        content = {
            command: options,
            "provenance": {
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                "versions": {"minispeed": __version__, "torch": torch.__version__, "python": platform.python_version()},
                "data": data_hash,
                "prepared": str(prepared.resolve()),
            },
        }
        text = json.dumps(content, indent=1) + "\n"
        checkpoint.write_whole(self.path / "run.json", lambda path: path.write_text(text))

    def effective_options(self, command: str) -> dict[str, Any]:
        """Read back the options that run.json holds.  Raises UserError if it cannot be read"""
        path = self.path / "run.json"
        try:
            return dict(json.loads(path.read_text())[command])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}", fix="the --out of an interrupted run") from error

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a line to a .jsonl file."""
        with (self.path / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def records(self, name: str) -> list[dict[str, Any]]:
        """Read a .jsonl file back."""
        path = self.path / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def save_checkpoint(
        self,
        pieces: Sequence[checkpoint.Piece],
        state: dict[str, Any],
        group: Group,
        *,
        best: bool,
        last: int = 1,
        every: int = 0,
        wait: bool = True,
    ) -> None:
        """Write checkpoints/step-N together, point `last` (and `best`) to it, and drop those that are not kept.

        last, every  which others stay: see `minispeed.checkpoint.to_delete`; what a pointer names always does
        wait         False: return once all is copied; the checkpoint stands, and counts, after the next `wait`
        Raises       UserError, the same on every rank, if one could not write this checkpoint or the one before
        """
        self.wait()
        directory = self.path / "checkpoints" / f"step-{state['step']:08d}"
        then = partial(self._point_to, directory, state["step"], best=best, last=last, every=every)
        if wait:
            checkpoint.save(directory, pieces, state, group, then)
        else:
            self._saver = self._saver or checkpoint.Saver(group)
            self._saver.save(directory, pieces, state, then)

    def wait(self) -> None:
        """Return once the checkpoint that is still being written stands; every rank calls this.

        Raises  UserError, the same on every rank, if one could not write
        """
        if self._saver is not None:
            self._saver.wait()

    def _point_to(self, directory: Path, step: int, *, best: bool, last: int, every: int) -> None:
        """Point `last` (and `best`) to a checkpoint that stands, then delete those that are not kept."""
        for pointer in POINTERS if best else POINTERS[:1]:
            checkpoint.write_whole(directory.parent / pointer, lambda path: path.write_text(directory.name + "\n"))
        self.drop_others(step, last=last, every=every)

    def drop_others(self, step: int, *, last: int, every: int) -> None:
        """Delete the checkpoints that a run at this step does not keep."""
        folder = self.path / "checkpoints"
        names = {(folder / pointer).read_text().strip() for pointer in POINTERS if (folder / pointer).exists()}
        there = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdigit()}
        named = {other for other, path in there.items() if path.name in names}
        past = {other for other in there if other <= step}  # later ones are of a run that was taken back to before
        gone = there.keys() - past - named | set(checkpoint.to_delete(past, last=last, every=every, named=named))
        for other in sorted(gone):
            checkpoint.discard(there[other])

    def load_checkpoint(self, pointer: str = "last") -> checkpoint.Checkpoint:
        """Open the checkpoint that `last` or `best` names.  Raises UserError if it is damaged, with one that is not"""
        folder = self.path / "checkpoints"
        name = (folder / pointer).read_text(encoding="utf-8", errors="replace").strip() or "nothing"
        if not checkpoint.is_checkpoint(checkpoint.standing(folder / name)):
            other = checkpoint.newest_whole(folder)
            what = f"{folder / pointer} names {name}, which is no checkpoint"
            raise UserError(what, fix=f"{other} is whole" if other else "another run")
        return checkpoint.Checkpoint(folder / name)


def has_checkpoints(run: Path) -> bool:
    """Whether a run has written any checkpoint, whole or not."""
    return bool(checkpoint.checkpoints_in(run / "checkpoints"))


def use_threads(count: int, *, ranks: int = 1) -> int:
    """Let torch compute with `count` threads, or with this rank's share of the cores; return how many."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(count or max(1, usable // ranks))
    return torch.get_num_threads()
