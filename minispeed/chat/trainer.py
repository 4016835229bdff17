"""The training loop of a run, and what happens in it: update, evaluate, sample, save, and at the end score and draw.

Every rank runs the same lines; only rank 0 prints and writes, but for each rank's part of a checkpoint.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from minispeed.chat.commands import SftOptions
from minispeed.chat.conversation import Conversation
from minispeed.chat.evaluate import (
    Loss,
    answer_all,
    by_name,
    by_task,
    bytes_of_tokens,
    figures_of,
    first_of_each_task,
    measure_loss,
    micro_batches,
    table_of,
    target_counts,
)
from minispeed.chat.interrupts import deferred_interrupt
from minispeed.chat.pack import Packing
from minispeed.chat.prepare import Prepared
from minispeed.chat.run import ChatModel, RunDirectory
from minispeed.chat.score import Answered, unigram_loss
from minispeed.collective.group import Group
from minispeed.engine import Engine, Report
from minispeed.errors import UserError
from minispeed.figures import draw_run
from minispeed.model.gpt import GPT
from minispeed.model.recompute import recompute
from minispeed.options import to_json
from minispeed.precision import choose_precision
from minispeed.scaler import LossScaler
from minispeed.schedules import warmup_then
from minispeed.zero.sharded import Offload

CPU = torch.device("cpu")
NUM_EVAL_STEPS = 16  # batches of the evaluations while training; the last one reads everything
FIRST_SAMPLE = 25  # steps; then at every doubling


@dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint."""

    epoch: int = 0
    step_of_epoch: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    seconds: float = 0.0  # spent in updates

    def state(self) -> dict[str, Any]:
        """Return what JSON can hold (it has no infinity)."""
        return {**vars(self), "best_loss": None if math.isinf(self.best_loss) else self.best_loss}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """Return what `state` described."""
        return cls(**{**state, "best_loss": math.inf if state["best_loss"] is None else state["best_loss"]})


class Trainer:
    """The loop and what happens in it: update, evaluate, sample, save."""

    def __init__(
        self, options: SftOptions, run: RunDirectory, chat: ChatModel, prepared: Prepared, group: Group
    ) -> None:
        self.options, self.run, self.chat, self.prepared, self.group = options, run, chat, prepared, group
        self.is_first = group.rank == 0
        assert options.seq and options.batch and options.lr is not None and options.warmup is not None
        if options.batch % group.size:
            raise UserError(
                f"--batch {options.batch} rows do not divide over {group.size} ranks",
                fix=f"--batch {-(-options.batch // group.size) * group.size}",
            )
        assert options.micro_batch
        if not prepared.train.learnt[:].any():
            raise UserError("no token of the training data is learnt: it holds no answer", fix="--train-on all")
        weights = options.weights or None
        self.packing = Packing(prepared.train, seq=options.seq, batch=options.batch, seed=options.seed, weights=weights)
        self.eval_packing = None
        if len(prepared.eval):
            self.eval_packing = Packing(prepared.eval, seq=options.seq, batch=options.batch)
        self.token_bytes = bytes_of_tokens(chat)
        self.total = options.steps or sum(map(self.packing.steps_per_epoch, range(options.epochs or 0)))
        assert options.weight_decay is not None
        precision = choose_precision(options.dtype)
        if options.batch // group.size <= options.micro_batch:  # one micro-batch: nothing is added up
            precision = replace(precision, accumulate=precision.compute)
        recompute(chat.model, options.recompute)
        if options.compile:
            compile_blocks(chat.model, options.zero)
        scaler = LossScaler.static(options.loss_scale) if options.loss_scale else LossScaler()
        self.engine = Engine(
            chat.model,
            group,
            zero=options.zero,
            precision=precision,
            scaler=scaler if precision.needs_scaler else None,
            bucket=options.bucket,
            overlap=options.overlap,
            prefetch=options.prefetch,
            persistence=options.persistence,
            offload=Offload(
                states=CPU if options.offload_optimizer else None, parameters=CPU if options.offload_param else None
            ),
            schedule=self.schedule(),
            lr=options.lr,
            weight_decay=options.weight_decay,
            clip=options.clip,
        )
        self.progress = Progress()
        self.deadline = math.inf  # seconds in updates after which a run that was given minutes ends at once
        self.pace: list[float] = []  # seconds of each update so far, while the number of steps is still open
        self.bar = tqdm(disable=True)

    def schedule(self) -> Any:
        """The learning rate's course; before the number of steps is known only its rise is ever asked for."""
        warmup = self.options.warmup or 0
        return warmup_then(self.options.lr_schedule, warmup=warmup, total=self.total or warmup + 1)

    def train(self) -> int:
        """Run to the end, or to ctrl-C; write the model; score it. Returns the exit code."""
        if self.options.resume:
            self.load()
        self.write_options()
        untrained = self.evaluate() if self.engine.step == 0 else {}
        stopping = False
        with deferred_interrupt(quiet=not self.is_first) as interrupted:
            hidden = None if self.is_first else True
            self.bar = tqdm(
                total=self.total or None, initial=self.engine.step, unit="step", disable=hidden, leave=False
            )
            while not self.total or self.engine.step < self.total:
                self.update()
                step = self.engine.step
                if self.is_due(step, self.options.eval_every):
                    self.evaluate()
                if (
                    self.options.samples
                    and step >= FIRST_SAMPLE
                    and (step % FIRST_SAMPLE == 0 and _is_power(step // FIRST_SAMPLE))
                ):
                    self.sample()
                if self.is_due(step, self.options.save_every):
                    self.save(best=False)
                if stopping := self.any_rank(interrupted.is_set()):
                    break
                if self.is_late():
                    break
            self.bar.close()
        if stopping and self.engine.step < (self.total or math.inf):
            self.save(best=False)
            self.save_model()
            where = self.run.path
            self.say(f"stopped at step {self.engine.step} of {self.total or 'an open number'}, saved in {where}")
            self.say(f"to go on: minispeed sft --config {where / 'run.json'} --resume")
            return 130
        self.finish(untrained)
        return 0

    def update(self) -> None:
        """Make one update and write it down."""
        tasks = self.packing.documents.tasks
        seen = [Loss(0.0, 0, 0)] * len(tasks)

        def observe(micro: Any, losses: torch.Tensor) -> None:
            for index, loss in enumerate(by_task(micro, losses, self.token_bytes, len(tasks))):
                seen[index] += loss

        progress = self.progress
        assert self.options.micro_batch
        start = time.perf_counter()
        batch = self.packing.batch(progress.epoch, progress.step_of_epoch)
        mine = micro_batches(batch, self.options.micro_batch, self.group)
        report = self.engine.train_step(mine, observe)
        losses = by_name(seen, tasks, self.group)
        seconds = time.perf_counter() - start
        progress.seconds += seconds
        progress.step_of_epoch += 1
        if progress.step_of_epoch == self.packing.steps_per_epoch(progress.epoch):
            progress.epoch, progress.step_of_epoch = progress.epoch + 1, 0
        if not self.total:
            self.pace.append(seconds)
            self.set_total()
        self.record(report, seconds, {task: loss.per_token for task, loss in losses.items()})

    def set_total(self) -> None:
        """Once the learning rate has risen, measure the pace and fix the number of steps that fill the time."""
        assert self.options.minutes is not None
        budget = self.options.minutes * 60
        is_slow = len(self.pace) >= 3 and self.progress.seconds > 0.15 * budget
        if not self.all_ranks(is_slow or len(self.pace) >= max(5, self.options.warmup or 0)):
            return
        self.deadline = budget
        left = budget - self.progress.seconds
        steps = torch.tensor([max(1, round(left / statistics.median(self.pace[len(self.pace) // 2 :])))])
        self.group.broadcast(steps, 0).wait()
        self.total = self.engine.step + int(steps)
        self.options = replace(self.options, steps=self.total, minutes=None)
        self.engine.schedule = self.schedule()
        self.bar.total = self.total
        self.write_options()

    def record(self, report: Report, seconds: float, tasks: dict[str, float]) -> None:
        """Write a line of metrics and move the progress bar."""
        rate = report.num_tokens / seconds
        figures = {"step": self.engine.step, **vars(report), "seconds": seconds, "tokens_per_second": rate}
        self.append("metrics.jsonl", {**figures, "tasks": tasks})
        self.bar.set_postfix_str(f"loss {report.loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update()
        if report.skipped:
            self.say(f"step {self.engine.step}: skipped, the loss scale is now {self.engine.scaler.scale:g}")
        if report.nonfinite:
            what = f"{report.nonfinite}, and the loss scale {report.scale:g} can go no lower"
            raise UserError(what, fix="a lower --lr, or --dtype fp32 to see whether it comes from rounding")

    def evaluate(self, *, whole: bool = False) -> dict[str, Loss]:
        """Return held-out losses per task, write them down, and keep the best checkpoint."""
        if self.eval_packing is None:
            return {}
        assert self.options.micro_batch
        with self.engine.sharded.running():
            losses = measure_loss(
                self.chat.model,
                self.eval_packing,
                self.token_bytes,
                micro_batch=self.options.micro_batch,
                most_steps=None if whole else NUM_EVAL_STEPS,
                group=self.group,
            )
        together = sum(losses.values(), Loss(0.0, 0, 0))
        step = self.engine.step
        tasks = {task: loss.per_token for task, loss in losses.items()}
        self.append("metrics.jsonl", {"step": step, "eval_loss": together.per_token, "eval_tasks": tasks})
        self.say(f"step {step}: held-out loss {together.per_token:.4f}, perplexity {together.perplexity:.2f}")
        if step and not whole and together.per_token < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = together.per_token, step
            self.save(best=True)
        return losses

    def sample(self) -> None:
        """Answer a few held-out prompts of each task; print one each with a tick or a cross, and keep all."""
        conversations = first_of_each_task(self.prepared.eval_conversations(), self.options.samples)
        step = self.engine.step
        answered = self.answer(conversations)
        for one in answered:
            self.append("samples.jsonl", {"step": step, **vars(one), "right": one.is_right})
        right = sum(one.is_right for one in answered) / max(1, len(answered))
        self.say(f"\nstep {step}, {self.progress.seconds:.0f} s of training: {right:.0%} of the answers are right")
        self.say(transcript(answered))

    def save(self, *, best: bool) -> None:
        """Write a checkpoint of everything."""
        engine = self.engine
        state: dict[str, Any] = {"step": engine.step, "num_updates": engine.num_updates, "total": self.total}
        state |= {"progress": self.progress.state(), "scaler": engine.scaler.state()}
        self.run.save_checkpoint(engine.pieces(), state, engine.group, best=best)

    def load(self) -> None:
        """Go on from the last checkpoint."""
        stored = self.run.load_checkpoint()
        state = stored.state
        self.engine.load(stored, step=state["step"], num_updates=state["num_updates"])
        self.engine.scaler = LossScaler(**state["scaler"])
        self.progress = Progress.of(state["progress"])
        if not self.total and state["total"]:
            self.total = state["total"]
            self.engine.schedule = self.schedule()
        for name in ("metrics.jsonl", "samples.jsonl") if self.is_first else ():
            self.run.forget_after(name, self.engine.step)
        self.say(f"going on from step {self.engine.step}")

    def finish(self, untrained: dict[str, Loss]) -> None:
        """Save, score and draw what came out."""
        self.save(best=False)
        self.save_model()
        losses = self.evaluate(whole=True)
        if losses:
            self.say(self.compare(losses, untrained))
        if self.options.samples:
            self.sample()
        chosen = first_of_each_task(self.prepared.eval_conversations(), self.options.score)
        if self.options.score and chosen:
            self.say(table_of(figures_of(losses, self.answer(chosen, progress=True))))
        if not self.is_first:
            return
        for path in draw_run(self.run.path, self.run.records("metrics.jsonl"), self.run.records("samples.jsonl")):
            self.say(f"drawn: {path}")
        rate = statistics.median(r["tokens_per_second"] for r in self.run.records("metrics.jsonl") if "norm" in r)
        self.say(
            f"{self.engine.step} steps, {self.progress.seconds:.0f} s, {rate:,.0f} tokens/s; "
            f"the model is {self.run.path}"
        )
        self.say(f"talk to it: minispeed chat {self.run.path}")

    def compare(self, losses: dict[str, Loss], untrained: dict[str, Loss]) -> str:
        """Put the held-out perplexity beside the untrained model's and beside word frequencies alone."""
        whole = sum(losses.values(), Loss(0.0, 0, 0))
        vocab_size = self.chat.model.config.vocab_size
        held_out = self.prepared.eval
        frequencies = unigram_loss(
            target_counts(self.prepared.train, vocab_size), held_out.tokens[:][held_out.learnt[:]]
        )
        before = f"{sum(untrained.values(), Loss(0.0, 0, 0)).perplexity:,.1f}" if untrained else "not measured"
        best = self.progress
        text = (
            f"held-out perplexity {whole.perplexity:.2f} over {whole.tokens:,} tokens "
            f"(untrained {before}, token frequencies alone {math.exp(frequencies):,.1f}), "
            f"{whole.bits_per_byte:.3f} bits per byte"
        )
        if best.best_loss < whole.per_token - 0.01:
            text += f"\nit was better at step {best.best_step} (loss {best.best_loss:.3f}): checkpoints/best holds it"
        return text

    def is_late(self) -> bool:
        """Whether a tenth more than the minutes asked for is over: the machine has become slower than it was."""
        if math.isinf(self.deadline) or not self.any_rank(self.progress.seconds > 1.1 * self.deadline):
            return False
        self.say(
            f"the time is over at step {self.engine.step} of {self.total}: the machine became slower than it was, and "
            "the learning rate never came down; run.json repeats the run as it was planned, not as it ended"
        )
        return True

    def is_due(self, step: int, every: int | None) -> bool:
        """Whether something that happens every so often (by default eight times a run) happens after this step."""
        if not self.total:
            return False
        return step % (every or max(1, self.total // 8)) == 0 and step < self.total

    def all_ranks(self, flag: bool) -> bool:
        """Whether the flag is set on every rank."""
        return not self.any_rank(not flag)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        flags = torch.tensor([float(flag)])
        self.group.all_reduce(flags, "max").wait()
        return bool(flags)

    def answer(self, conversations: Sequence[Conversation], *, progress: bool = False) -> list[Answered]:
        """Let rank 0 answer; the other ranks lend it their shards, and return nothing."""
        with self.engine.sharded.gathered():
            answered = []
            if self.is_first:
                answered = answer_all(self.chat, conversations, max_new=self.options.max_new, progress=progress)
            barrier(self.group)
        return answered

    def save_model(self) -> None:
        """Write the model, whole, in the run's directory."""
        with self.engine.sharded.gathered():
            if self.is_first:
                self.chat.save(self.run.path)
            barrier(self.group)

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a line to a .jsonl file of the run, once."""
        if self.is_first:
            self.run.append(name, record)

    def write_options(self) -> None:
        """Write the effective options, with which the run can be repeated."""
        if not self.is_first:
            return
        options = to_json(replace(self.options, resume=False))
        data_hash, folder = self.prepared.report["key"], self.prepared.folder
        self.run.write_provenance("sft", options, data_hash=data_hash, prepared=folder)

    def say(self, text: str) -> None:
        """Print on rank 0, without breaking the progress bar."""
        if self.is_first:
            self.bar.write(text) if not self.bar.disable else print(text, flush=True)


def compile_blocks(model: GPT, stage: int) -> None:
    """Let torch.compile fuse each block.  Raises UserError at stage 3, whose parameters come and go unseen by it"""
    if stage == 3:
        raise UserError("--compile with --zero 3: a compiled layer reads parameters that are not there", fix="--zero 2")
    for block in model.blocks:
        block.compile()


def transcript(answered: list[Answered]) -> str:
    """Lay out the first answer of each task: a tick or a cross, the task, the prompt, the answer."""
    first: dict[str, Answered] = {}
    for one in answered:
        first.setdefault(one.task, one)
    width = max(map(len, first), default=0)
    return "\n".join(
        f"  {'✓' if one.is_right else '✗'} {task:{width}}  {_one_line(one.prompt, 48)}  ->  {_one_line(one.answer, 70)}"
        for task, one in first.items()
    )


def _one_line(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def barrier(group: Group) -> None:
    """Return once every rank of the group has come here."""
    group.all_reduce(torch.zeros(1)).wait()
