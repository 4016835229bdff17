"""Let the model write: prompts of unequal length in one batch, one token per row and step, keys and values cached.

Each step reads only the newest token of every row; what came before lies in the cache. Prompts are padded on the left,
so that all rows grow at the same column, and padding is a document of its own that no token looks at.

Sampling: temperature, then top-k, then top-p (nucleus sampling, Holtzman et al. 2019, section 3.1,
https://arxiv.org/abs/1904.09751).

Letters: B batch, T tokens of the longest prompt, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minispeed.errors import UserError
from minispeed.model.config import GPTConfig

PADDING, PROMPT = -1, 0  # document ids


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn.

    top_k  only the k likeliest (0: all); top_p  only the fewest that together have at least this probability
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is at least 0, got {self.temperature}", fix="--temperature 0.7")
        if self.top_k < 0:
            raise UserError(f"top-k counts tokens, got {self.top_k}", fix="--top-k 50, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is a probability above 0 and at most 1, got {self.top_p}", fix="--top-p 0.95")

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return one token for each row.  (B, V) -> (B,)"""
        if self.temperature == 0:
            return logits.argmax(-1)
        kept = self.keep(logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature)
        place = "cpu" if generator is None else generator.device  # a generator draws where it lives
        return torch.multinomial(kept.softmax(-1).to(place), 1, generator=generator)[:, 0].to(logits.device)

    def keep(self, logits: Tensor) -> Tensor:
        """Return the logits with every token that top-k or top-p leaves out at -inf.  (B, V) -> (B, V)"""
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(logits.shape[-1], device=logits.device)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability  # what the likelier ones have together
        out = before >= self.top_p if self.top_p < 1 else torch.zeros_like(before, dtype=torch.bool)
        if self.top_k:
            out = out | (rank >= self.top_k)
        return logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), float("-inf"))


class Answer(NamedTuple):
    """What a row wrote, without the stop token; `stopped` says whether it ended by itself."""

    tokens: list[int]
    stopped: bool


class Reader(Protocol):
    """What writes: a GPT, or one that lies in parts on several ranks."""

    config: GPTConfig

    @property
    def device(self) -> torch.device:
        """Where tokens are to be."""

    def new_cache(self, capacity: int) -> Any:
        """Return room for so many tokens a row, to be given to `next_logits`."""

    def next_logits(self, tokens: Tensor, *, cache: Any, **rows: Any) -> Tensor:
        """Read new tokens and return the scores of what follows the last.  (B, T) -> (B, V)"""


@torch.no_grad()
def decode(
    model: Reader,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    tasks: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, (B,) int64, up to `max_new` times or until every row is full.

    tasks  of each prompt, where the model has weights for several; the first when absent
    What is yielded for a row after it is full (`check_room`) means nothing. The caller may stop before.

    Raises  UserError if a prompt is empty or leaves no room in the model's positions
    """
    room = max(check_room(model, prompts, max_new))
    sampling = sampling or Sampling()
    T = max(map(len, prompts))
    tokens = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=model.device)  # (B, T)
    places = torch.tensor([[i - (T - len(p)) for i in range(T)] for p in prompts], device=model.device)
    documents = torch.where(places < 0, PADDING, PROMPT)
    positions = places.clamp(min=0)
    task = torch.tensor(tasks or [0] * len(prompts), device=model.device)[:, None]
    cache = model.new_cache(T + room)
    for _ in range(room):
        rows = {"positions": positions, "documents": documents, "tasks": task.expand_as(tokens)}
        chosen = sampling.choose(model.next_logits(tokens, cache=cache, **rows), generator)
        yield chosen
        tokens, positions = chosen[:, None], (positions[:, -1:] + 1).clamp(max=model.config.max_positions - 1)
        documents = torch.full_like(tokens, PROMPT)


def check_room(model: Reader, prompts: Sequence[Sequence[int]], max_new: int) -> list[int]:
    """Return how many tokens can be written after each prompt, at most `max_new`."""
    longest, places = max(map(len, prompts), default=0), model.config.max_positions
    if not prompts or not min(map(len, prompts)):
        raise UserError("a prompt has no tokens", fix="at least one token, usually the template's first")
    if longest >= places:
        raise UserError(
            f"the prompt has {longest} tokens, and the model reads at most {places}",
            fix="a shorter conversation",
        )
    return [min(max_new, places - len(prompt)) for prompt in prompts]


def generate(
    model: Reader,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Iterable[int],
    max_new: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    tasks: Sequence[int] | None = None,
) -> list[Answer]:
    """Answer every prompt; a row is over at its first token in `stop`, the batch when all rows are."""
    stops = set(stop)
    written: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    if not prompts:
        return []
    room = check_room(model, prompts, max_new)
    for chosen in decode(model, prompts, max_new=max_new, sampling=sampling, generator=generator, tasks=tasks):
        for row, token in enumerate(chosen.tolist()):
            if stopped[row] or len(written[row]) == room[row]:
                continue
            if token in stops:
                stopped[row] = True
            else:
                written[row].append(token)
        if all(over or len(tokens) == most for over, tokens, most in zip(stopped, written, room)):
            break
    return [Answer(tokens, over) for tokens, over in zip(written, stopped)]
