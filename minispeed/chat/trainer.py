"""The training loop of a run, and what happens in it: update, evaluate, sample, save, and at the end score and draw.

Every rank runs the same lines; only rank 0 prints and writes, but for each rank's part of a checkpoint.
"""

import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from minispeed.chat.build import Chosen, build_engine, build_rows, build_schedule
from minispeed.chat.chat_model import ChatModel
from minispeed.chat.clock import Clock, sample_is_due
from minispeed.chat.commands import SftOptions
from minispeed.chat.evaluate import Loss, by_name, by_task, share_of
from minispeed.chat.examine import Examiner, over_all
from minispeed.chat.interrupts import deferred_interrupt
from minispeed.chat.journal import METRICS, SAMPLES, Journal
from minispeed.chat.prepared import Prepared
from minispeed.chat.run import RunDirectory
from minispeed.chat.together import fix_together
from minispeed.chat.tracing import Tracer
from minispeed.collective.group import Group
from minispeed.collective.numbers import any_of, barrier
from minispeed.engine import Report
from minispeed.errors import UserError
from minispeed.figures import draw_run
from minispeed.scaler import LossScaler


@dataclass
class Progress:
    """Where in the data a run stands, and when it was best."""

    epoch: int = 0
    step_of_epoch: int = 0
    best_loss: float = math.inf
    best_step: int = 0

    def advance(self, steps_of_epoch: int) -> None:
        """Move on by a step, into the next epoch where this one is over."""
        self.step_of_epoch += 1
        if self.step_of_epoch == steps_of_epoch:
            self.epoch, self.step_of_epoch = self.epoch + 1, 0

    def state(self) -> dict[str, Any]:
        """Return what JSON can hold (it has no infinity)."""
        return {**vars(self), "best_loss": None if math.isinf(self.best_loss) else self.best_loss}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """Return what `state` described."""
        return cls(**{**state, "best_loss": math.inf if state["best_loss"] is None else state["best_loss"]})


class Trainer:
    """One run on one rank: its model, its rows, its clock, and the loop over them."""

    def __init__(
        self,
        options: SftOptions,
        run: RunDirectory,
        chat: ChatModel,
        prepared: Prepared,
        group: Group,
        tracer: Tracer,
    ) -> None:
        self.tracer = tracer
        self.options, self.run, self.chat, self.prepared, self.group = options, run, chat, prepared, group
        self.journal = Journal(run, is_heard=group.rank == 0)
        self.say = self.journal.say
        self.rows, held_out = build_rows(options, prepared, group)
        self.chosen = chosen = Chosen.of(options)
        total = options.steps or sum(map(self.rows.steps_per_epoch, range(options.epochs or 0)))
        self.clock = Clock.of(total, options.minutes, warmup=chosen.warmup)
        self.engine = build_engine(options, chat.model, group, build_schedule(options, total))
        self.examiner = Examiner(
            options, chat, prepared, held_out, self.engine, self.journal, micro_batch=chosen.micro_batch
        )
        self.progress = Progress()

    @property
    def total(self) -> int:
        """How many steps the run has in all; 0 while that is open."""
        return self.clock.total

    def train(self) -> int:
        """Run to the end, or to ctrl-C; write the model; score it. Returns the exit code."""
        if self.options.resume:
            self.load()
        self.journal.write_options(self.options, self.prepared)
        untrained = self.evaluate() if self.engine.step == 0 else {}
        was_stopped = self.make_steps()
        if was_stopped and (self.clock.is_open or self.engine.step < self.total):
            self.save(best=False)
            self.save_model()
            where = self.run.path
            self.say(f"stopped at step {self.engine.step} of {self.total or 'an open number'}, saved in {where}")
            self.say(f"to go on: minispeed sft --config {where / 'run.json'} --resume")
            return 130
        self.finish(untrained)
        return 0

    def make_steps(self) -> bool:
        """Make the steps that are left, and what is due after each; return whether ctrl-C ended it."""
        was_stopped = False
        with deferred_interrupt(quiet=not self.journal.is_heard) as interrupted:
            self.journal.start_bar(self.engine.step, self.total)
            while self.clock.is_open or self.engine.step < self.total:
                self.update()
                step = self.engine.step
                if self.clock.is_due(step, self.options.eval_every):
                    self.evaluate()
                if self.options.samples and sample_is_due(step):
                    self.examiner.sample(self.clock.spent)
                if self.clock.is_due(step, self.options.save_every):
                    self.save(best=False)
                if was_stopped := any_of(self.group, interrupted.is_set()):
                    break
                if self.is_late():
                    break
            self.journal.bar.close()
        return was_stopped

    def update(self) -> None:
        """Make one update and write it down."""
        tasks = self.rows.documents.tasks
        seen = [Loss(0.0, 0, 0)] * len(tasks)

        def observe(micro: Any, losses: torch.Tensor) -> None:
            for index, loss in enumerate(by_task(micro, losses, self.examiner.token_bytes, len(tasks))):
                seen[index] += loss

        progress = self.progress
        start = time.perf_counter()
        batch = self.rows.batch(progress.epoch, progress.step_of_epoch)
        with self.tracer.step(self.engine):
            report = self.engine.train_step(share_of(batch, self.chosen.micro_batch, self.engine.lines), observe)
        losses = by_name(seen, tasks, self.group)
        seconds = time.perf_counter() - start
        progress.advance(self.rows.steps_per_epoch(progress.epoch))
        self.clock = self.clock.after(seconds)
        if self.clock.is_open:
            self.fix_total()
        per_token = {task: loss.per_token for task, loss in losses.items()}
        self.journal.record_update(self.engine.step, report, seconds, per_token)
        self.check(report)

    def fix_total(self) -> None:
        """Fix the number of steps if the pace is known, and with it how the learning rate falls."""
        self.clock = fix_together(self.clock, self.engine.step, self.group)
        if self.clock.is_open:
            return
        self.options = replace(self.options, steps=self.total, minutes=None)
        self.engine.schedule = build_schedule(self.options, self.total)
        self.journal.bar.total = self.total
        self.journal.write_options(self.options, self.prepared)

    def check(self, report: Report) -> None:
        """Say that an update was skipped.  Raises UserError where the loss scale cannot help any more"""
        if report.skipped:
            self.say(f"step {self.engine.step}: skipped, the loss scale is now {self.engine.scaler.scale:g}")
        if report.nonfinite:
            what = f"{report.nonfinite}, and the loss scale {report.scale:g} can go no lower"
            raise UserError(what, fix="a lower --lr or --loss-scale; --dtype fp32 to see whether it is rounding")

    def is_late(self) -> bool:
        """Whether the time is over on any rank; if so, say it."""
        if math.isinf(self.clock.budget) or self.engine.step == self.total:
            return False
        if not any_of(self.group, self.clock.is_over):
            return False
        self.say(
            f"the time is over at step {self.engine.step} of {self.total}: the machine became slower than it was, and "
            "the learning rate never came down; run.json repeats the run as it was planned, not as it ended"
        )
        return True

    def evaluate(self) -> dict[str, Loss]:
        """Return the held-out losses, and keep the checkpoint of the lowest."""
        losses, step = self.examiner.measure(), self.engine.step
        loss = over_all(losses).per_token
        if self.examiner.held_out is not None and step and loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = loss, step
            self.save(best=True)
        return losses

    def save(self, *, best: bool) -> None:
        """Write a checkpoint of everything."""
        engine = self.engine
        state: dict[str, Any] = {"step": engine.step, "num_updates": engine.num_updates, "total": self.total}
        state["progress"] = {**self.progress.state(), "seconds": self.clock.spent}
        state["scaler"] = engine.scaler.state()
        self.run.save_checkpoint(engine.pieces(), state, engine.group, best=best)

    def save_model(self) -> None:
        """Write the model, whole, in the run's directory: the masters of the last checkpoint, rounded."""
        if self.group.rank == 0:
            stored, compute = self.run.load_checkpoint(), self.engine.precision.compute
            masters = {name: stored.tensor(f"parameters/{name}") for name in self.engine.names}
            self.chat.save(self.run.path, {n: x.to(compute) for n, x in masters.items() if x is not None})
        barrier(self.group)

    def load(self) -> None:
        """Go on from the last checkpoint."""
        stored = self.run.load_checkpoint()
        state = stored.state
        self.engine.load(stored, step=state["step"], num_updates=state["num_updates"])
        self.engine.scaler = LossScaler(**state["scaler"])
        where = dict(state["progress"])
        self.clock = replace(self.clock, total=self.total or state["total"], spent=where.pop("seconds"))
        self.progress = Progress.of(where)
        self.engine.schedule = build_schedule(self.options, self.total)
        self.journal.forget_after(self.engine.step)
        self.say(f"going on from step {self.engine.step}")

    def finish(self, untrained: dict[str, Loss]) -> None:
        """Save, score and draw what came out."""
        self.save(best=False)
        self.save_model()
        if losses := self.examiner.measure(whole=True):
            self.examiner.compare(losses, untrained)
            if self.progress.best_loss < over_all(losses).per_token - 0.01:
                best, loss = self.progress.best_step, self.progress.best_loss
                self.say(f"it was better at step {best} (loss {loss:.3f}): checkpoints/best holds it")
        if self.options.samples:
            self.examiner.sample(self.clock.spent)
        self.examiner.score(losses)
        if self.group.rank == 0:
            self.close()

    def close(self) -> None:
        """Draw what was written down, and say how long it took and where it is."""
        metrics, samples = self.run.records(METRICS), self.run.records(SAMPLES)
        for path in draw_run(self.run.path, metrics, samples):
            self.say(f"drawn: {path}")
        rate = statistics.median(record["tokens_per_second"] for record in metrics if "norm" in record)
        took = f"{self.engine.step} steps, {self.clock.spent:.0f} s, {rate:,.0f} tokens/s"
        self.say(f"{took}; the model is {self.run.path}")
        self.say(f"talk to it: minispeed chat {self.run.path}")
