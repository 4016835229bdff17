"""Write the checkpoints of a run, outlive a full disk, and find the checkpoint to go on from.

A save that fails leaves the checkpoint before it whole: so it is said, and the run goes on. Every rank takes part in
each call, and every rank is told the same.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minispeed import checkpoint
from minispeed.chat.chat_model import ChatModel
from minispeed.chat.journal import Journal
from minispeed.chat.opening import lora_of
from minispeed.chat.run import RunDirectory
from minispeed.chat.sft_options import SftOptions
from minispeed.checkpoint import Checkpoint
from minispeed.collective.group import CollectiveError
from minispeed.collective.numbers import any_of
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.model.adapter import save_adapter
from minispeed.model.hf.config import family_for
from minispeed.model.lora import LoRA
from minispeed.model.merge import merged

CHECKPOINTS, ADAPTER = "checkpoints", "adapter"


class RunSaver:
    """Writes and finds the checkpoints of one run.

    step  of the last checkpoint that stands, or that the run went on from; -1 before the first
    """

    def __init__(self, options: SftOptions, run: RunDirectory, engine: Engine, journal: Journal) -> None:
        self.options, self.run, self.engine, self.journal = options, run, engine, journal
        self.folder = run.path / CHECKPOINTS
        self.step = self.begun = -1

    @property
    def standing(self) -> str:
        """Which checkpoint is the last good one, in words."""
        if self.step < 0:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.folder / name_of(self.step)}"

    def save(self, state: Mapping[str, Any], *, wait: bool) -> bool:
        """Write a checkpoint of this step, unless it is there; return whether it is, or, unless waited for, is begun.

        wait  for it, also where checkpoints are written in the background
        """
        self.settle()
        step, wait = self.engine.step, wait or not self.options.save_async
        if step == self.step:
            return True
        is_done = self._is_done(lambda: self._save(state, wait=wait))
        if is_done:
            self.begun = step
        if wait:
            self.settle()
        if not is_done:
            self._warn_of(step)
        return is_done

    def settle(self) -> None:
        """Return once the checkpoint that is being written in the background stands, or is known not to."""
        if self.begun < 0:
            return
        if self._is_done(self.run.wait):
            self.step = self.begun
        else:
            self._warn_of(self.begun)
        self.begun = -1

    def mark_best(self) -> bool:
        """Let `best` name the checkpoint of this step; return whether there is one."""
        self.settle()
        return self.engine.step == self.step and self._is_done(self._mark_best)

    def save_model(self, chat: ChatModel) -> bool:
        """Write the model, whole, in the run's directory: the masters of the last checkpoint, rounded.

        Returns  whether that is done
        """
        return self._is_done(lambda: self._save_model(chat))

    def newest_good(self) -> Checkpoint:
        """Open the last checkpoint; where it is damaged, the newest that is not, and say so.

        Raises  UserError on every rank if none is whole
        """
        chosen = torch.tensor([-1])
        if self.engine.group.rank == 0:
            chosen[0] = self._look()
        self.engine.group.broadcast(chosen, 0).wait()
        if int(chosen) < 0:
            raise UserError(f"no checkpoint in {self.folder} is whole", fix="a new run: another --out")
        self.step = int(chosen)
        return Checkpoint(self.folder / name_of(self.step))

    def _look(self) -> int:
        """Return the step of the last checkpoint, or, where it is damaged, of the newest whole one; -1 if none is."""
        pointer = self.folder / "last"
        named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.exists() else ""
        last = self.folder / (named or "nothing")
        problems = checkpoint.problems(last) if named else [f"{pointer} is missing or empty"]
        if not problems:
            return step_of(last.name)
        self.journal.warn(f"{last} is damaged: {problems[0]}")
        other = checkpoint.newest_whole(self.folder, besides=last)
        if other is None:
            return -1
        self.journal.warn(f"going on from {other} in place of {last}")
        checkpoint.write_whole(pointer, lambda path: path.write_text(other.name + "\n"))
        return step_of(other.name)

    def _save(self, state: Mapping[str, Any], *, wait: bool) -> None:
        kept = {"last": self.options.keep_last, "every": self.options.keep_every}
        self.run.save_checkpoint(self.engine.pieces(), dict(state), self.engine.group, best=False, wait=wait, **kept)

    def _warn_of(self, step: int) -> None:
        self.journal.warn(f"step {step} is not saved, and the run goes on; {self.standing}")

    def _mark_best(self) -> None:
        """Point `best` to the last checkpoint, and delete the one that was the best, if nothing else keeps it."""
        if self.engine.group.rank == 0:
            checkpoint.write_whole(self.folder / "best", lambda path: path.write_text(name_of(self.step) + "\n"))
            self.run.drop_others(self.step, last=self.options.keep_last, every=self.options.keep_every)
            there = {step_of(path.name): path for path in self.folder.glob("step-*")}
            last, every = self.options.keep_last, self.options.keep_every
            for step in checkpoint.to_delete(there, last=last, every=every, named=[self.step]):
                checkpoint.discard(there[step])

    def _save_model(self, chat: ChatModel) -> None:
        if self.engine.group.rank == 0:
            stored, compute = Checkpoint(self.folder / name_of(self.step)), self.engine.precision.compute
            masters = {name: stored.tensor(f"parameters/{name}") for name in self.engine.names}
            found = {name: x for name, x in masters.items() if x is not None}
            if (lora := lora_of(self.options)) is not None:
                self._save_adapter(found, lora, chat)
                found = merged(found, lora)
            chat.save(self.run.path, {name: x.to(compute) for name, x in found.items()})

    def _save_adapter(self, found: Mapping[str, Tensor], lora: LoRA, chat: ChatModel) -> None:
        """Write the adapters alone, in peft's form, where it has one for such a model."""
        try:
            family_for(chat.model.config)
        except UserError as error:
            self.journal.warn(f"no {ADAPTER}/ in peft's form is written: {error.what}")
            return
        grew = chat.tokenizer.lacked > 0
        base = str(Path(self.options.model).resolve()) if Path(self.options.model).is_dir() else self.options.model

        def write(folder: Path) -> None:
            save_adapter(folder, found, lora, chat.model.config, base=base, ends=grew)

        checkpoint.write_whole(self.run.path / ADAPTER, write)
        if grew:
            rows = chat.model.config.vocab_size
            self.journal.say(
                f"{ADAPTER}/ holds embedding and head too, of {rows} rows: before peft reads it, "
                f"model.resize_token_embeddings({rows})"
            )

    def _is_done(self, write: Callable[[], None]) -> bool:
        """Write; return whether that went well on all ranks, and say why where it did not."""
        is_done = True
        try:
            write()
        except CollectiveError:
            raise
        except (UserError, OSError) as error:
            is_done = False
            self.journal.warn(error.what if isinstance(error, UserError) else str(error))
        return not any_of(self.engine.group, not is_done)


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """Return the step of a checkpoint with that name."""
    return int(name.removeprefix("step-"))
