"""Cut every row of a GPT by tokens over the ranks of a group: all but attention runs on a rank's own tokens.

A token meets another one in attention alone. So each rank runs the model on its T/P tokens of every row, with the
positions they have in the row, and only the attentions' cores are exchanged for one that speaks:

    kind      a rank's tokens of a row         needs
    ulysses   one run of T/P                   P divides the key/value heads
    ring      two runs of T/2P (`zigzag`)      nothing

Parameters are whole on every rank, and a rank's gradients are what its own tokens say: to be summed over the ranks, as
in data parallelism.

    cut = cut_sequence(model, "ring", group)
    positions = torch.arange(T).expand(B, T)
    tokens, labels, positions = cut.share(tokens, fill=0), cut.share(labels, fill=-100), cut.share(positions, fill=0)
    model(tokens, labels, positions=positions).sum().backward()

Letters: B batch, T tokens of whole rows, P ranks.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minispeed.collective.group import Group
from minispeed.errors import UserError, nearest
from minispeed.model.dropout import Dropping
from minispeed.model.gpt import GPT, Attention
from minispeed.model.mask import Mask
from minispeed.sequence.ring import ring, zigzag
from minispeed.sequence.ulysses import Core, check_heads, contiguous, ulysses, whole_masks

TOKENS = 1  # the dim that is cut: (B, T, ..)


@dataclass(frozen=True)
class Kind:
    """One way to cut rows.

    chunks       (rank, size) -> which chunks of a row a rank holds; there are as many on every rank
    cores        group -> what makes of an attention's core one that speaks; what layers can share, they share
    cuts_heads   whether P must divide the heads
    """

    chunks: Callable[[int, int], tuple[int, ...]]
    cores: Callable[[Group], Callable[[Core], Core]]
    cuts_heads: bool


def _ulysses_cores(group: Group) -> Callable[[Core], Core]:
    return partial(ulysses, group=group, whole_mask=whole_masks(group))


def _ring_cores(group: Group) -> Callable[[Core], Core]:
    core = ring(group)
    return lambda replaced: core


KINDS = {
    "ulysses": Kind(contiguous, _ulysses_cores, cuts_heads=True),
    "ring": Kind(zigzag, _ring_cores, cuts_heads=False),
}


def cut_sequence(model: nn.Module, kind: str, group: Group) -> "SequenceCut":
    """Let every attention of a model, which every rank of the group has built alike, look beyond its rank's tokens.

    kind     "ulysses" or "ring"
    Writes   the `core` of every `Attention` of the model; a tensor-parallel model is cut by heads before
    Returns  what shares rows out, and for a while lets every rank hold whole ones
    Raises   UserError on an unknown kind, a model without attention or cut before, heads that P does not divide, or
             attention that drops weights
    """
    if kind not in KINDS:
        fix = nearest(kind, KINDS) or ", ".join(KINDS)
        raise UserError(f"rows are cut by {' or '.join(KINDS)}, not {kind!r}", fix=fix)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]
    if not found:
        raise UserError(f"no attention in this {type(model).__name__}", fix="a minispeed.model.gpt.GPT")
    for module in model.modules():
        if isinstance(module, Dropping) and module.weights:
            what = f"attention_dropout {module.weights} with sp={group.size}: drawn only where a rank sees whole rows"
            raise UserError(what, fix="sp=1, or GPTConfig.dropout, which knows of cut rows")
    for name, attention in found:
        if isinstance(attention.core, SequenceCore):
            raise UserError(f"the rows of {name} are cut already", fix="cut_sequence once, on a fresh model")
        if KINDS[kind].cuts_heads:
            num_kv_heads = attention.qkv.weight.shape[0] // (attention.num_shares + 2) // attention.head_dim
            check_heads(num_kv_heads * attention.num_shares, num_kv_heads, group.size)
    cut = SequenceCut(kind, group, dict(found))
    speaking = KINDS[kind].cores(group)
    for _, attention in found:
        attention.core = SequenceCore(cut, attention.core, speaking(attention.core))
    for module in model.modules():
        if isinstance(module, GPT):
            module.register_forward_pre_hook(cut.check_positions, with_kwargs=True)
    return cut


class SequenceCut:
    """How the rows of one model lie on the ranks; made by `cut_sequence`.

    is_cut  whether a rank holds T/P tokens of every row, or all
    """

    def __init__(self, kind: str, group: Group, attentions: dict[str, Attention]) -> None:
        self.kind, self.group, self.attentions = kind, group, attentions
        self.is_cut = True

    def share(self, x: Tensor, *, fill: int) -> Tensor:
        """Return this rank's tokens of whole rows, which every rank was given; inside `whole_rows` all of them.

        fill     what stands in the tokens that are added at the end of rows whose length the chunks do not divide:
                 -100 in labels, -1 in documents
        Returns  (B, T, ..) -> (B, T/P, ..), T rounded up to a multiple of P (ulysses) or 2 P (ring)
        Raises   UserError if an attention has lost the core it was given
        """
        self._check_cores()
        if not self.is_cut:
            return x
        mine = KINDS[self.kind].chunks(self.group.rank, self.group.size)
        num_chunks = len(mine) * self.group.size
        missing = -x.shape[TOKENS] % num_chunks
        padded = F.pad(x.movedim(TOKENS, -1), (0, missing), value=fill).movedim(-1, TOKENS)
        chunks = padded.chunk(num_chunks, dim=TOKENS)
        return torch.cat([chunks[number] for number in mine], dim=TOKENS)

    @contextlib.contextmanager
    def whole_rows(self) -> Iterator[None]:
        """Let every rank hold all tokens for a while: to generate with a cache, or to evaluate.

        A forward and its backward must both lie inside, or both outside.
        """
        before, self.is_cut = self.is_cut, False
        try:
            yield
        finally:
            self.is_cut = before

    def check_positions(self, model: nn.Module, args: tuple[Any, ...], rows: dict[str, Any]) -> None:
        """Raise UserError where a model would count positions from the start of this rank's tokens."""
        if self.is_cut and rows.get("positions") is None:
            what = "a rank's tokens are not its rows' first ones, and no positions are given"
            raise UserError(what, fix="positions=cut.share(torch.arange(T).expand(B, T), fill=0)")

    def _check_cores(self) -> None:
        for name, attention in self.attentions.items():
            inside = (attention.core, *getattr(attention.core, "args", ()))  # of a partial: recomputed
            if not any(isinstance(core, SequenceCore) and core.cut is self for core in inside):
                what = f"{name}.core was replaced after its rows had been cut: ranks would see their own tokens alone"
                raise UserError(what, fix="another core before cut_sequence(model, ..)")


class SequenceCore:
    """An attention's core that looks beyond the rank's tokens, and for a while is the one it was."""

    def __init__(self, cut: SequenceCut, whole: Core, speaking: Core) -> None:
        self.cut, self.whole, self.speaking = cut, whole, speaking

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Attend.  (B, H, T/P or T, K), (B, G, T/P or T, K) twice -> (B, H, T/P or T, K)"""
        return (self.speaking if self.cut.is_cut else self.whole)(q, k, v, mask)
