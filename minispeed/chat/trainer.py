"""The training loop of a run, and what happens in it: update, save, evaluate, sample, and at the end score and draw.

Every rank runs the same lines; only rank 0 prints and writes, but for each rank's part of a checkpoint.
"""

import math
import time
from dataclasses import replace
from typing import Any

import torch

from minispeed.chat.build import Chosen, build_engine, build_rows, build_schedule
from minispeed.chat.chat_model import ChatModel
from minispeed.chat.clock import Clock, sample_is_due
from minispeed.chat.evaluate import Loss, by_name, by_task, share_of
from minispeed.chat.examine import Examiner, deciding
from minispeed.chat.interrupts import deferred_stop, exit_code
from minispeed.chat.job import job_of, memory_table, mfu_of
from minispeed.chat.journal import Journal
from minispeed.chat.preflight import Preflight, most_kept
from minispeed.chat.prepared import Prepared
from minispeed.chat.progress import Progress
from minispeed.chat.run import RunDirectory
from minispeed.chat.saving import RunSaver
from minispeed.chat.sft_options import SftOptions
from minispeed.chat.sources import write_sources
from minispeed.chat.together import fix_together
from minispeed.chat.tracing import Tracer
from minispeed.collective.group import Group
from minispeed.collective.numbers import any_of
from minispeed.engine import Report
from minispeed.errors import UserError
from minispeed.ledger.measure import measure
from minispeed.ledger.memory import memory
from minispeed.runner import MicroBatch, Observe
from minispeed.scaler import LossScaler
from minispeed.snapshot import given_by


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
        self.engine = build_engine(options, chat, group, build_schedule(options, total))
        self.examiner = Examiner(
            options, chat, prepared, held_out, self.engine, self.journal, micro_batch=chosen.micro_batch
        )
        self.journal.mfu = mfu_of(options, chat.model.config, group.size, self.engine.device)
        self.saver = RunSaver(options, run, self.engine, self.journal)
        self.progress = Progress()

    @property
    def total(self) -> int:
        """How many steps the run has in all; 0 while that is open."""
        return self.clock.total

    @property
    def is_over(self) -> bool:
        """Whether all steps are made."""
        return not self.clock.is_open and self.engine.step >= self.total

    def train(self) -> int:
        """Run to the end, or until it is asked to stop; write the model; score it. Returns the exit code."""
        if self.options.resume:
            self.load()
        if self.options.preflight:
            self.try_out()
        self.journal.write_options(self.options, self.prepared)
        if not self.options.resume:
            self.begin()
        if self.engine.step == 0:
            self.evaluate()
        else:
            self.after_step()
        stopped_by = self.make_steps()
        if not stopped_by or self.is_over:
            return self.finish()
        return exit_code(stopped_by) if self.stop() else 1

    def try_out(self) -> None:
        """Do once all that the run will do, and leave nothing of it."""
        Preflight(
            engine=self.engine,
            examiner=self.examiner,
            journal=self.journal,
            path=self.run.path,
            micros=self.next_rows(),
            kept=most_kept(self.options, self.total),
        ).check()

    def make_steps(self) -> int:
        """Make the steps that are left, and what is due after each; return the signal that ended it, or 0."""
        stopped_by = 0
        with deferred_stop(quiet=not self.journal.is_heard) as stop:
            self.journal.start_bar(self.engine.step, self.total)
            while not self.is_over:
                self.update()
                self.after_step()
                if stopped_by := stop.agreed(self.group):
                    break
                if self.is_late():
                    break
            self.journal.bar.close()
        return stopped_by

    def after_step(self) -> None:
        """Do what is due after a step; a checkpoint comes first, so that a crash in the rest loses nothing.

        A run that goes on from a checkpoint does this again before its next step.
        """
        step, options = self.engine.step, self.options
        is_examined = self.clock.is_due(step, options.eval_every)
        if is_examined or self.clock.is_due(step, options.save_every):
            self.save(wait=is_examined)
        if is_examined:
            self.evaluate()
        if options.samples and sample_is_due(step):
            self.examiner.sample(self.clock.spent)

    def next_rows(self) -> list[MicroBatch]:
        """Return this replica's micro-batches of the next step."""
        batch = self.rows.batch(self.progress.epoch, self.progress.step_of_epoch)
        return share_of(batch, self.chosen.micro_batch, self.engine.lines)

    def update(self) -> None:
        """Make one update and write it down."""
        tasks = self.rows.documents.tasks
        seen = [Loss(0.0, 0, 0)] * len(tasks)

        def observe(micro: Any, losses: torch.Tensor) -> None:
            for index, loss in enumerate(by_task(micro, losses, self.examiner.token_bytes, len(tasks))):
                seen[index] += loss

        progress = self.progress
        start = time.perf_counter()
        rows = self.next_rows()
        with self.tracer.step(self.engine):
            report = self.make_step(rows, observe)
        losses = by_name(seen, tasks, self.group)
        seconds = time.perf_counter() - start
        progress.advance(self.rows.steps_per_epoch(progress.epoch))
        self.clock = self.clock.after(seconds)
        if self.clock.is_open:
            self.fix_total()
        per_token = {task: loss.per_token for task, loss in losses.items()}
        self.journal.record_update(self.engine.step, report, seconds, per_token)
        self.check(report)

    def make_step(self, rows: list[MicroBatch], observe: Observe) -> Report:
        """Make one update; in the second, when all states are there, see what rank 0 holds beside what it was to."""
        if self.engine.step != 1 or self.group.rank or self.options.compile or self.options.trace:
            return self.engine.train_step(rows, observe)
        reports: list[Report] = []
        found = measure(self.engine, lambda: reports.append(self.engine.train_step(rows, observe)))
        (report,) = reports
        supervised = report.num_supervised / (self.chosen.batch * self.chosen.seq)
        job = job_of(self.options, self.chat.model.config, self.group.size, supervised=supervised)
        for line in memory_table(memory(job), found):
            self.say(line)
        return report

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
        """Say that an update was skipped.

        Raises  UserError after --max-skipped in a row that the loss scale could not help
        """
        self.progress.skipped = self.progress.skipped + 1 if report.nonfinite else 0
        if report.skipped and not report.nonfinite:
            self.say(f"step {self.engine.step}: skipped, the loss scale is now {self.engine.scaler.scale:g}")
        count, most = self.progress.skipped, self.options.max_skipped
        lowest = f", and the loss scale {report.scale:g} can go no lower" if self.engine.precision.needs_scaler else ""
        what = f"{report.nonfinite}{lowest}"
        if 0 < count < most:
            self.journal.warn(f"{what}: skipped, {count} in a row; {most} end the run")
        if count == most:
            raise UserError(
                f"{what}; {count} steps in a row were skipped, and {self.saver.standing}",
                fix="a lower --lr or --loss-scale; --dtype fp32 to see whether it is rounding",
            )

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

    def evaluate(self) -> None:
        """Measure the held-out losses, let `best` name the checkpoint of the lowest, and have the prompts answered."""
        losses, step = self.examiner.measure(), self.engine.step
        loss = deciding(losses).per_token if losses else math.inf
        if step and loss < self.progress.best_loss and self.saver.mark_best():
            self.progress.best_loss, self.progress.best_step = loss, step
        self.examiner.ask()

    def save(self, *, wait: bool = True) -> bool:
        """Write a checkpoint of everything; return whether it stands, or, if nobody waits for it, is begun."""
        engine = self.engine
        state: dict[str, Any] = {"step": engine.step, "num_updates": engine.num_updates, "total": self.total}
        state["progress"] = {**self.progress.state(), "seconds": self.clock.spent}
        state["scaler"] = engine.scaler.state()
        return self.saver.save(state, wait=wait)

    def save_all(self) -> bool:
        """Write a checkpoint and the model; return whether both are written."""
        is_saved = self.save() and self.saver.save_model(self.chat)
        if not is_saved:
            self.journal.warn(f"minispeed: not all of the run is saved; {self.saver.standing}")
        return is_saved

    def begin(self) -> None:
        """Leave nothing of a run that was killed before its first checkpoint, and write down what this one reads."""
        self.journal.forget_after(-1)
        if self.journal.is_heard:
            write_sources(self.run.path, self.options, self.prepared)

    def load(self) -> None:
        """Go on from the last checkpoint that is whole."""
        stored = self.saver.newest_good()
        state = stored.state
        known, held = set(self.engine.names), given_by(stored)
        for name in sorted(held ^ known):
            which = "holds" if name in held else "lacks"
            what = f"{stored.directory} {which} {name}, unlike the model of this run"
            raise UserError(what, fix="the options that the run began with")
        self.engine.load(stored, step=state["step"], num_updates=state["num_updates"])
        self.engine.scaler = LossScaler(**state["scaler"])
        where = dict(state["progress"])
        self.clock = replace(self.clock, total=self.total or state["total"], spent=where.pop("seconds"))
        self.progress = Progress.of(where)
        self.engine.schedule = build_schedule(self.options, self.total)
        self.journal.forget_after(self.engine.step)
        self.say(f"going on from step {self.engine.step}")

    def stop(self) -> bool:
        """Save, and say how to go on; return whether all is saved."""
        is_saved = self.save_all()
        where = self.run.path
        saved = f"saved in {where}" if is_saved else "not saved"
        self.say(f"stopped at step {self.engine.step} of {self.total or 'an open number'}, {saved}")
        self.say(f"to go on: minispeed sft --config {where / 'run.json'} --resume")
        return is_saved

    def finish(self) -> int:
        """Save, score and draw what came out. Returns the exit code."""
        is_saved = self.save_all()
        if losses := self.examiner.measure(whole=True):
            self.examiner.compare(losses)
            loss, best = deciding(losses).per_token, self.progress
            if loss < best.best_loss:
                self.saver.mark_best()
            elif best.best_loss < loss - 0.01:
                step, lowest = best.best_step, best.best_loss
                self.say(f"it was better at step {step} (loss {lowest:.3f}): checkpoints/best holds it")
        self.examiner.ask()
        if self.options.samples:
            self.examiner.sample(self.clock.spent)
        self.examiner.score(losses)
        self.journal.close(self.engine.step, self.clock.spent)
        return 0 if is_saved else 1
