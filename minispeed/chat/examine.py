"""Examine a model that is being trained: its loss on held-out rows, its answers to held-out prompts, the final scores.

What is found is said and written down as it is found; what follows from it is for others to decide.
"""

from collections.abc import Sequence

from minispeed.chat.chat_model import ChatModel
from minispeed.chat.commands import SftOptions
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
from minispeed.chat.journal import METRICS, SAMPLES, Journal, comparison, transcript
from minispeed.chat.pack import Packing
from minispeed.chat.prepared import Prepared
from minispeed.chat.score import Answered, unigram_loss
from minispeed.engine import Engine

NUM_EVAL_STEPS = 16  # batches of the evaluations while training; the last one reads everything


class Examiner:
    """Asks one model, again and again, what it has learnt.

    held_out     rows that the loss is measured on; None where nothing is held out
    micro_batch  rows that go through the model at once
    """

    def __init__(
        self,
        options: SftOptions,
        chat: ChatModel,
        prepared: Prepared,
        held_out: Packing | None,
        engine: Engine,
        journal: Journal,
        *,
        micro_batch: int,
    ) -> None:
        self.options, self.chat, self.prepared, self.held_out = options, chat, prepared, held_out
        self.engine, self.journal, self.micro_batch = engine, journal, micro_batch
        self.token_bytes = bytes_of_tokens(chat)

    def measure(self, *, whole: bool = False) -> dict[str, Loss]:
        """Return the held-out loss of each task, of the first rows or the whole; empty where nothing is held out."""
        if self.held_out is None:
            return {}
        losses = measure_loss(
            self.engine.runner.evaluate,
            self.held_out,
            self.token_bytes,
            micro_batch=self.micro_batch,
            most_steps=None if whole else NUM_EVAL_STEPS,
            lines=self.engine.lines,
        )
        together, step = over_all(losses), self.engine.step
        tasks = {task: loss.per_token for task, loss in losses.items()}
        self.journal.append(METRICS, {"step": step, "eval_loss": together.per_token, "eval_tasks": tasks})
        self.journal.say(f"step {step}: held-out loss {together.per_token:.4f}, perplexity {together.perplexity:.2f}")
        return losses

    def sample(self, seconds: float) -> None:
        """Have a few prompts of each task answered; print one each with a tick or a cross, and keep all.

        seconds  of training that are behind the model
        """
        step = self.engine.step
        answered = self._answers(first_of_each_task(self.prepared.eval_conversations(), self.options.samples))
        for one in answered:
            self.journal.append(SAMPLES, {"step": step, **vars(one), "right": one.is_right})
        right = sum(one.is_right for one in answered) / max(1, len(answered))
        self.journal.say(f"\nstep {step}, {seconds:.0f} s of training: {right:.0%} of the answers are right")
        self.journal.say(transcript(answered))

    def compare(self, losses: dict[str, Loss], untrained: dict[str, Loss]) -> None:
        """Say what the losses are beside the untrained model's, where those were measured, and token frequencies."""
        counts = target_counts(self.prepared.train, self.chat.model.config.vocab_size)
        held_out = self.prepared.eval
        frequencies = unigram_loss(counts, held_out.tokens[:][held_out.learnt[:]])
        self.journal.say(comparison(over_all(losses), over_all(untrained) if untrained else None, frequencies))

    def score(self, losses: dict[str, Loss]) -> None:
        """Have as many prompts of each task answered as asked for, and print the table of all figures."""
        chosen = first_of_each_task(self.prepared.eval_conversations(), self.options.score)
        if self.options.score and chosen:
            self.journal.say(table_of(figures_of(losses, self._answers(chosen, progress=True))))

    def _answers(self, conversations: Sequence[Conversation], *, progress: bool = False) -> list[Answered]:
        """Return what the model answers; every rank reads and writes alike."""
        most, progress = self.options.max_new, progress and self.engine.group.rank == 0
        with self.engine.reading() as reader:
            return answer_all(self.chat, conversations, max_new=most, progress=progress, reader=reader)


def over_all(losses: dict[str, Loss]) -> Loss:
    """Return the losses of all tasks added up."""
    return sum(losses.values(), Loss(0.0, 0, 0))
