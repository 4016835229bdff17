"""Score a model on conversations that it has not seen: its loss, token by token, and its answers.

Loss is exact over all supervised tokens (a mean of batch means would weigh short batches more). It is given as
perplexity and as bits per byte, which compares across tokenizers. Answers are generated greedily by the code that
serves them, from the same prompt that training saw.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from minispeed.chat.chat_model import ChatModel
from minispeed.chat.commands import EvalOptions
from minispeed.chat.conversation import Conversation
from minispeed.chat.documents import Documents
from minispeed.chat.pack import Batch, Packing
from minispeed.chat.prepare import encode_documents
from minispeed.chat.prepared import Prepared
from minispeed.chat.read import read
from minispeed.chat.run import use_threads
from minispeed.chat.score import Answered, bleu, found_by, has_answer, split_last, summarise_tasks
from minispeed.collective.group import Group, SoloGroup
from minispeed.collective.world import best_device
from minispeed.errors import UserError
from minispeed.model.dropout import cells_of
from minispeed.model.generate import Reader, Sampling, generate
from minispeed.model.loss import IGNORED
from minispeed.parts import Lines
from minispeed.runner import MicroBatch, Observe

ANSWERS_AT_ONCE = 64


class Loss(NamedTuple):
    """Summed over supervised tokens: nats, how many tokens, how many bytes of text they stand for."""

    nats: float
    tokens: int
    bytes: int

    @property
    def per_token(self) -> float:
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token."""
        return math.exp(min(self.per_token, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(1, self.bytes)

    def __add__(self, other: "Loss") -> "Loss":  # type: ignore[override]
        return Loss(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


def micro_batches(batch: Batch, size: int, group: Group | None = None, *, all: bool = False) -> list[MicroBatch]:
    """Return my share of a step's rows in micro-batches of `size` rows.

    Row k goes to rank k mod N. Micro-batches in which no rank has a supervised token are left out, unless `all` are
    wanted: every rank has as many.
    """
    group = group or SoloGroup()
    whole = [*map(torch.from_numpy, batch), cells_of(range(len(batch.labels)), batch.labels.shape[1])]
    columns = [column[group.rank :: group.size].split(size) for column in whole]
    of_all = torch.from_numpy(batch.labels).split(size * group.size)
    cut = [MicroBatch(*(part.contiguous() for part in parts)) for parts in zip(*columns)]
    return [micro for micro, labels in zip(cut, of_all) if all or (labels != IGNORED).any()] or cut[:1]


Evaluate = Callable[[Sequence[MicroBatch], Observe], None]  # show the second each of the first with its losses


def evaluate_with(model: nn.Module) -> Evaluate:
    """Return what runs micro-batches through a model that is whole on this rank."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def evaluate(micro_batches: Sequence[MicroBatch], observe: Observe) -> None:
        for micro in micro_batches:
            here = micro.to(device)
            rows = {"positions": here.positions, "documents": here.documents, "tasks": here.tasks}
            observe(here, model(here.tokens, here.labels, **rows))

    return evaluate


def measure_loss(
    evaluate: Evaluate,
    packing: Packing,
    token_bytes: torch.Tensor,
    *,
    micro_batch: int,
    most_steps: int | None = None,
    lines: Lines | None = None,
) -> dict[str, Loss]:
    """Return the loss of each task over (at most `most_steps` steps of) the packed documents, rows shared by the ranks.

    evaluate     `evaluate_with(model)`, or an engine's `runner.evaluate`
    token_bytes  bytes of text that each token stands for, (V,)
    lines        where this rank stands, if it is not alone
    """
    tasks = packing.documents.tasks
    total = [Loss(0.0, 0, 0)] * len(tasks)

    def add(micro: MicroBatch, losses: torch.Tensor) -> None:
        for index, loss in enumerate(by_task(micro, losses, token_bytes, len(tasks))):
            total[index] += loss

    steps = packing.steps_per_epoch(0)
    for step in range(steps if most_steps is None else min(steps, most_steps)):
        batch = packing.batch(0, step)
        evaluate(share_of(batch, micro_batch, lines), add)
    return by_name(total, tasks, lines.world if lines else None)


def share_of(batch: Batch, size: int, lines: Lines | None) -> list[MicroBatch]:
    """Return a replica's micro-batches; a pipeline gets empty ones too, for its programs are made for a number."""
    return micro_batches(batch, size, lines.dp if lines else None, all=lines is not None and lines.pp.size > 1)


def by_name(losses: Sequence[Loss], tasks: Sequence[str], group: Group | None = None) -> dict[str, Loss]:
    """Add the ranks' losses up, and return those of the tasks that had any token, by name."""
    table = torch.tensor(losses, dtype=torch.float64)  # (tasks, 3)
    (group or SoloGroup()).all_reduce(table).wait()
    summed = [Loss(nats, int(tokens), int(spelt)) for nats, tokens, spelt in table.tolist()]
    return {task: loss for task, loss in zip(tasks, summed) if loss.tokens}


def by_task(micro: MicroBatch, losses: torch.Tensor, token_bytes: torch.Tensor, num_tasks: int) -> list[Loss]:
    """Add up per-token losses by task.  (B, T) -> one Loss per task"""
    losses, micro = losses.to("cpu"), micro.to(torch.device("cpu"))
    supervised = micro.labels != IGNORED
    tasks = micro.tasks[supervised]
    nats = torch.zeros(num_tasks, dtype=torch.float64).index_add_(0, tasks, losses[supervised].to(torch.float64))
    tokens = torch.bincount(tasks, minlength=num_tasks)
    spelt = torch.zeros(num_tasks, dtype=torch.int64).index_add_(0, tasks, token_bytes[micro.labels[supervised]])
    return [Loss(*values) for values in zip(nats.tolist(), tokens.tolist(), spelt.tolist())]


def bytes_of_tokens(chat: ChatModel) -> torch.Tensor:
    """Return how many bytes of text each token stands for, 0 for special ones.  (V,) int64"""
    lengths = torch.zeros(chat.model.config.vocab_size, dtype=torch.int64)
    lengths[: chat.tokenizer.size] = torch.tensor(chat.tokenizer.byte_lengths())
    return lengths


def target_counts(documents: Documents, vocab_size: int) -> np.ndarray[Any, Any]:
    """Return how often each token is supervised.  (V,)"""
    return np.bincount(documents.tokens[np.asarray(documents.learnt)], minlength=vocab_size)


def answer_all(
    chat: ChatModel,
    conversations: Sequence[Conversation],
    *,
    max_new: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: bool = False,
    reader: Reader | None = None,
) -> list[Answered]:
    """Let the model give the last answer of each conversation, and put it beside the one wanted.

    reader    what writes in the model's place: the same, in parts on several ranks
    sampling  how tokens are chosen, from `seed`; the likeliest when absent
    Prompts of like length share a batch; those too long for the model are left out, those without an answer too.
    """
    prompts = []
    for conversation in filter(has_answer, conversations):
        turns, wanted = split_last(conversation)
        ids = chat.template.prompt(turns, chat.tokenizer)
        if len(ids) < chat.model.config.max_positions:
            prompts.append((ids, conversation, turns[-1].text, wanted))
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index][0]))
    answered: dict[int, Answered] = {}
    stop, generator = chat.template.stop_id(chat.tokenizer), torch.Generator().manual_seed(seed)
    bar = tqdm(total=len(order), desc="answer", unit="prompt", disable=None if progress else True, leave=False)
    for start in range(0, len(order), ANSWERS_AT_ONCE):
        chosen = order[start : start + ANSWERS_AT_ONCE]
        answers = generate(
            reader or chat.model,
            [prompts[index][0] for index in chosen],
            stop=[stop],
            max_new=max_new,
            sampling=sampling,
            generator=generator,
        )
        for index, answer in zip(chosen, answers):
            _, conversation, asked, wanted = prompts[index]
            text = chat.tokenizer.decode(answer.tokens)
            answered[index] = Answered(conversation.task, conversation.metric, asked, wanted, text, answer.stopped)
        bar.update(len(chosen))
    bar.close()
    return [answered[index] for index in range(len(prompts))]


def first_of_each_task(conversations: Sequence[Conversation], count: int) -> list[Conversation]:
    """Return the first `count` conversations of each task that ask for an answer (all where count is 0)."""
    taken: dict[str, int] = {}
    chosen = []
    for conversation in filter(has_answer, conversations):
        taken[conversation.task] = taken.get(conversation.task, 0) + 1
        if not count or taken[conversation.task] <= count:
            chosen.append(conversation)
    return chosen


def evaluate_run(options: EvalOptions) -> int:
    """Do `minispeed eval`: print a table, or JSON, of a run's loss and answers."""
    use_threads(options.threads)
    chat = ChatModel.load(options.run, device=best_device())
    for note in chat.notes:
        print(note, file=sys.stderr)
    if options.pattern is not None:
        found_by(options.pattern, [])  # a wrong one is said before anything is answered
    conversations = list(_conversations(options))
    if not conversations:
        raise UserError("there is nothing to score: no conversation was read", fix="--data FILE")
    seq = min(chat.model.config.max_positions, _run_options(options.run).get("seq") or 512)
    documents = encode_documents(conversations, chat.tokenizer, chat.template)
    packing = Packing(documents, seq=seq, batch=8)
    losses = measure_loss(evaluate_with(chat.model), packing, bytes_of_tokens(chat), micro_batch=8)
    chosen = first_of_each_task(conversations, options.score)
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    answered = answer_all(chat, chosen, max_new=options.max_new, sampling=sampling, seed=options.seed, progress=True)
    figures = figures_of(losses, answered)
    if options.pattern is not None:
        figures["pattern"] = {"pattern": options.pattern, "found": found_by(options.pattern, answered)}
    print(json.dumps(figures, indent=1) if options.json else table_of(figures))
    return 0


def figures_of(losses: dict[str, Loss], answered: Sequence[Answered]) -> dict[str, Any]:
    """Return all figures of an evaluation as plain values, per task and over all."""
    whole = sum(losses.values(), Loss(0.0, 0, 0))
    tasks = summarise_tasks(answered)
    for task, loss in losses.items():
        tasks.setdefault(task, {})
        tasks[task] |= {"perplexity": loss.perplexity, "bits_per_byte": loss.bits_per_byte, "tokens": loss.tokens}
    return {
        "tasks": tasks,
        "perplexity": whole.perplexity,
        "bits_per_byte": whole.bits_per_byte,
        "tokens": whole.tokens,
        "answers": len(answered),
        "right": sum(a.is_right for a in answered) / max(1, len(answered)),
        "stopped": sum(a.stopped for a in answered) / max(1, len(answered)),
        "bleu": bleu(answered),
    }


def table_of(figures: dict[str, Any]) -> str:
    """Lay the figures out, a line a task."""
    width = max([4, *map(len, figures["tasks"])])
    lines = [f"{'task':{width}}  perplexity  bits/byte  answers  right  stopped  BLEU"]
    for name, row in [*figures["tasks"].items(), ("all", {**figures, "count": figures["answers"]})]:
        extra = (
            f"  precision {row['precision']:.2f}, recall {row['recall']:.2f}, F1 {row['f1']:.2f}" if "f1" in row else ""
        )
        lines.append(
            f"{name:{width}}  {_number(row, 'perplexity', 10, '.2f')}  {_number(row, 'bits_per_byte', 9, '.3f')}  "
            f"{_number(row, 'count', 7, 'd')}  {_number(row, 'right', 5, '.0%')}  {_number(row, 'stopped', 7, '.0%')}  "
            f"{_number(row, 'bleu', 4, '.0f')}{extra}"
        )
    if "pattern" in figures:
        lines.append(f"{figures['pattern']['found']:.1%} of the answers hold {figures['pattern']['pattern']!r}")
    if figures["bleu"] is None and figures["answers"]:
        lines.append("(BLEU needs sacrebleu: pip install 'minispeed[eval]')")
    return "\n".join(lines)


def _number(row: dict[str, Any], name: str, width: int, form: str) -> str:
    value = row.get(name)
    return f"{'-' if value is None else format(value, form):>{width}}"


def _conversations(options: EvalOptions) -> Iterator[Conversation]:
    """Yield what is scored: the files given, or what the run held out."""
    for path in options.data:
        for line in read(path).lines:
            yield line.conversation
    if not options.data:
        prepared = Path(_run_options(options.run)["prepared"])
        yield from Prepared.open(prepared).eval_conversations()


def _run_options(run: Path) -> dict[str, Any]:
    """Return what run.json says of the training options and where its data was prepared."""
    try:
        content = json.loads((run / "run.json").read_text())
        return {**content["sft"], "prepared": content["provenance"]["prepared"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run / 'run.json'} cannot be read: {error}", fix="--data FILE") from error
