"""Examine a model that is being trained: its loss on held-out rows, its answers to held-out prompts, the final scores.

What is found is said and written down as it is found; what follows from it is for others to decide. Each file of
--eval-data is measured on its own: the first tells how well the run does what it is for, and decides which checkpoint
is the best; others tell what it costs elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from minispeed.chat.chat_model import ChatModel
from minispeed.chat.conversation import Conversation
from minispeed.chat.evaluate import (
    Loss,
    answer_all,
    bytes_of_tokens,
    figures_of,
    first_of_each_task,
    measure_loss,
    table_of,
    target_counts,
)
from minispeed.chat.journal import METRICS, PROMPTS, SAMPLES, Journal, before_and_after, comparison, records, transcript
from minispeed.chat.pack import Packing
from minispeed.chat.prepared import Prepared
from minispeed.chat.samples import PAGE, name_of, page_of, read_prompts
from minispeed.chat.score import Answered, unigram_loss
from minispeed.chat.sft_options import SftOptions
from minispeed.engine import Engine

NUM_EVAL_STEPS = 16  # batches of each file in the evaluations while training; the last one reads everything
Losses: TypeAlias = dict[str, dict[str, Loss]]  # by held-out file, then by task


class Examiner:
    """Asks one model, again and again, what it has learnt.

    held_out     rows that the loss is measured on, by file; empty where nothing is held out
    prompts      what it is asked at each evaluation, from --prompts
    micro_batch  rows that go through the model at once
    """

    def __init__(
        self,
        options: SftOptions,
        chat: ChatModel,
        prepared: Prepared,
        held_out: Mapping[str, Packing],
        engine: Engine,
        journal: Journal,
        *,
        micro_batch: int,
    ) -> None:
        self.options, self.chat, self.prepared, self.held_out = options, chat, prepared, held_out
        self.engine, self.journal, self.micro_batch = engine, journal, micro_batch
        self.token_bytes = bytes_of_tokens(chat)
        self.prompts = read_prompts(options.prompts, chat) if options.prompts else []

    def measure(self, *, whole: bool = False) -> Losses:
        """Return the losses on the first rows of each held-out file, or on all; empty where nothing is held out."""
        losses = {name: self.loss_on(rows, None if whole else NUM_EVAL_STEPS) for name, rows in self.held_out.items()}
        if losses:
            step, files = self.engine.step, {name: over_all(tasks).per_token for name, tasks in losses.items()}
            tasks = {task: loss.per_token for task, loss in by_task(losses).items()}
            first = deciding(losses)
            line = {"step": step, "eval_loss": first.per_token, "eval_files": files, "eval_tasks": tasks}
            self.journal.append(METRICS, line)
            others = "".join(f"; {name} {loss:.4f}" for name, loss in list(files.items())[1:])
            which = f" {next(iter(files))}" if others else ""
            told = f"held-out loss{which} {first.per_token:.4f}, perplexity {first.perplexity:.2f}{others}"
            self.journal.say(f"step {step}: {told}")
        return losses

    def loss_on(self, rows: Packing, most_steps: int | None) -> dict[str, Loss]:
        """Return the loss of each task on (at most so many batches of) some rows."""
        return measure_loss(
            self.engine.runner.evaluate,
            rows,
            self.token_bytes,
            micro_batch=self.micro_batch,
            most_steps=most_steps,
            lines=self.engine.lines,
        )

    def ask(self) -> None:
        """Have the prompts of --prompts answered, and write the page that shows the answers of all moments."""
        if not self.prompts:
            return
        for prompt, one in zip(self.prompts, self.answers(self.prompts, most=self.options.max_new), strict=True):
            line = {"prompt": name_of(prompt), "answer": one.answer, "stopped": one.stopped}
            self.journal.append(PROMPTS, {"step": self.engine.step, **line})
        self.journal.write_page(PAGE, lambda: page_of(self.prompts, records(self.journal.run.path / PROMPTS)))

    def sample(self, seconds: float) -> None:
        """Have a few prompts of each task answered; print one each with a tick or a cross, and keep all.

        seconds  of training that are behind the model
        """
        step = self.engine.step
        chosen = first_of_each_task(self.prepared.eval_conversations(), self.options.samples)
        answered = self.answers(chosen, most=self.options.max_new)
        for one in answered:
            self.journal.append(SAMPLES, {"step": step, **vars(one), "right": one.is_right})
        right = sum(one.is_right for one in answered) / max(1, len(answered))
        self.journal.say(f"\nstep {step}, {seconds:.0f} s of training: {right:.0%} of the answers are right")
        self.journal.say(transcript(answered))

    def compare(self, losses: Losses) -> None:
        """Say what the losses are beside the untrained model's, where those were measured, and token frequencies."""
        counts = target_counts(self.prepared.train, self.chat.model.config.vocab_size)
        rows = next(iter(self.held_out.values())).documents
        untrained = self.journal.first_losses()
        frequencies = unigram_loss(counts, rows.tokens[:][rows.learnt[:]])
        self.journal.say(comparison(deciding(losses), untrained.get(next(iter(losses))), frequencies))
        if len(losses) > 1:
            self.journal.say(before_and_after({name: over_all(tasks) for name, tasks in losses.items()}, untrained))

    def score(self, losses: Losses) -> None:
        """Have as many prompts of each task answered as asked for, and print the table of all figures."""
        chosen = first_of_each_task(self.prepared.eval_conversations(), self.options.score)
        if self.options.score and chosen:
            answered = self.answers(chosen, most=self.options.max_new, progress=True)
            self.journal.say(table_of(figures_of(by_task(losses), answered)))

    def answers(self, conversations: Sequence[Conversation], *, most: int, progress: bool = False) -> list[Answered]:
        """Return what the model answers, of at most so many tokens; every rank reads and writes alike."""
        progress = progress and self.engine.group.rank == 0
        with self.engine.reading() as reader:
            return answer_all(self.chat, conversations, max_new=most, progress=progress, reader=reader)


def deciding(losses: Losses) -> Loss:
    """Return the loss on the first held-out file: the one that a run is judged by."""
    return over_all(next(iter(losses.values())))


def by_task(losses: Losses) -> dict[str, Loss]:
    """Return the losses of the tasks, those of a task in several files added up."""
    found: dict[str, Loss] = {}
    for tasks in losses.values():
        for task, loss in tasks.items():
            found[task] = found.get(task, Loss(0.0, 0, 0)) + loss
    return found


def over_all(losses: dict[str, Loss]) -> Loss:
    """Return the losses of all tasks added up."""
    return sum(losses.values(), Loss(0.0, 0, 0))
