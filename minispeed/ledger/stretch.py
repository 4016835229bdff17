"""Play the layers of a pipeline's stage: what it holds for each micro-batch, and the most that its backward needs.

Blocks are alike, so each kind is played once (`layers.py`), and the stage is put together of sums: what is kept by all
layers up to the one whose backward runs, and what that one needs. Between blocks of one kind that grows evenly, so of
each kind the first and the last stand for all.

Letters: L blocks, D model, V vocabulary of a rank; e bytes of an element.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from minispeed.ledger import buffers
from minispeed.ledger.layers import Setting, adapted, block, final_norm
from minispeed.ledger.tape import Played

EVERY = {"none": 0, "attention": 0, "all": 1}  # blocks from one that is recomputed to the next; 0: none is


class Step(NamedTuple):
    """A moment of a backward: the layer whose it is (L + 2 the loss, -1: it is over), and the bytes beyond `saved`."""

    layer: int
    extra: int


class Stretch(NamedTuple):
    """What a stage holds for one micro-batch.

    saved     by autograd for the backward
    held      beside it, by the pipeline: what came in and what went out
    put_off   after the first half of a split backward
    forward   the most during the forward, beyond `saved`
    steps     of the backward, those that may be the most
    """

    saved: int
    held: int
    put_off: int
    forward: int
    steps: tuple[Step, ...]


@lru_cache(maxsize=8192)
def stretch(of: Setting, recompute: str, first: int, last: int, supervised: int, head_stays: bool) -> Stretch:
    """Play layers first .. last - 1.

    supervised   tokens of a micro-batch whose loss is asked for
    head_stays   whether the head's gradient waits until the end of the backward
    """
    return _Stage(of, recompute, first, last, supervised, head_stays).played()


@dataclass(frozen=True)
class _Stage:
    of: Setting
    recompute: str
    first: int
    last: int
    supervised: int
    head_stays: bool

    def played(self) -> Stretch:
        steps = tuple(self.steps())
        waits = self.stream * (self.first > 0)  # the gradient that went back to the stage before
        put_off = sum(play.put_off for play in self.plays.values()) + waits
        return Stretch(self.saved, self.held, put_off, self.forward, steps)

    # ---- what is there

    @property
    def trains(self) -> bool:
        return not self.of.lora_rank

    @cached_property
    def stream(self) -> int:
        """Bytes of a layer's output."""
        return self.of.stream * self.of.config.model_dim * self.of.e

    @property
    def is_last(self) -> bool:
        return self.last == self.of.config.num_layers + 2

    @cached_property
    def head(self) -> int:
        """Bytes of the head's gradient."""
        return -(-self.of.config.vocab_size // self.of.t) * self.of.config.model_dim * self.of.e * self.trains

    @cached_property
    def blocks(self) -> list[int]:
        """The blocks' layers, 1 to L."""
        return [layer for layer in range(self.first, self.last) if 1 <= layer <= self.of.config.num_layers]

    @cached_property
    def again(self) -> set[int]:
        """The layers that run a second time."""
        every = EVERY[self.recompute] if self.recompute in EVERY else int(self.recompute)
        return {layer for layer in self.blocks if every and (layer - 1) % every == 0}

    @cached_property
    def plays(self) -> dict[int, Played]:
        """What each block holds."""
        kinds = {(layer == 1, layer == self.last - 1) for layer in self.blocks}
        found = {
            kind: block(replace(self.of, reaches=self.trains or not kind[0], holds=kind[1])) for kind in sorted(kinds)
        }
        return {layer: found[layer == 1, layer == self.last - 1] for layer in self.blocks}

    # ---- what is kept

    def kept_by(self, layer: int) -> int:
        """Return what a block keeps: its input alone, where it runs again."""
        return self.stream if layer in self.again else self.plays[layer].kept

    @cached_property
    def shared(self) -> tuple[int, int]:
        """Of what the blocks share, rotary angles and a mask: what autograd keeps, and what others hold."""
        of, config = self.of, self.of.config
        if not self.blocks:
            return 0, 0
        turns = (config.positions == "rotary") * of.b * of.s * config.head_dim * of.e
        has_mask = config.attention != "tiled" and (of.p == 1 or of.sequence == "ulysses")
        mask = has_mask * of.b * (of.s * of.p) ** 2 * of.e
        adapts = self.trains or "attention.qkv" in adapted(config, of.lora_rank, of.lora_targets)
        is_kept = any(layer not in self.again and (adapts or layer > 1) for layer in self.blocks)
        keeps_mask = is_kept and config.attention == "fused" and of.recomputed == "none"
        kept = turns * is_kept + mask * keeps_mask
        return kept, turns + mask - kept

    @cached_property
    def before(self) -> int:
        """What is kept beside the blocks' own: in front of them."""
        of = self.of
        tokens = 9 * of.b * of.s * (of.t > 1)  # where each token stands in a cut vocabulary, and whether it does
        dropped = (of.config.dropout > 0) * of.stream * of.config.model_dim
        return self.shared[0] + (self.first == 0) * (tokens + dropped) + self.columns * self.stream

    @cached_property
    def columns(self) -> int:
        """How many outputs deep connections keep for a later layer."""
        return len({j for _, j in self.of.config.connections.learned if self.first <= j < self.last})

    @cached_property
    def behind(self) -> int:
        """What is kept behind the blocks: by the last norm and the loss."""
        if not self.is_last:
            return 0
        of = self.of
        return self.supervised * (of.config.model_dim * of.e + 8 + of.w) + of.b * of.s + final_norm(of).kept

    @cached_property
    def saved(self) -> int:
        """All that autograd keeps."""
        return self.before + sum(map(self.kept_by, self.blocks)) + self.behind

    @property
    def held(self) -> int:
        """What others hold: recomputation the mask, the pipeline what came in and went out."""
        is_apart = bool(self.again) or self.of.recomputed == "attention"
        keeps_input = self.of.config.norm == "layernorm" or self.of.e == self.of.w or self.first in self.again
        crossing = (not self.is_last) + (self.first > 0 and not keeps_input)
        return self.shared[1] * is_apart + crossing * self.stream

    # ---- what comes and goes

    @property
    def forward(self) -> int:
        """The most during the forward, beyond what is saved: in some block, or while tokens become features."""
        there, most = self.before + self.shared[1], 3 * self.stream * (self.first == 0)
        for layer in self.blocks:
            most = max(most, there + self.plays[layer].forward + self.stream)
            there += self.kept_by(layer)
        return most - self.saved

    def steps(self) -> Iterator[Step]:
        """Yield the moments of the backward, the loss first."""
        L, stays = self.of.config.num_layers, self.head * self.head_stays * self.is_last
        given = self.stream * (not self.is_last)  # the gradient that came, which the pipeline holds until it is over
        there, put_off = -self.behind, 0
        if self.is_last:
            yield Step(L + 2, buffers.logits(self.of, self.supervised))
            yield Step(L + 1, there + final_norm(self.of).backward + self.head)
        ends = self._ends()
        for layer in reversed(self.blocks):
            there -= self.kept_by(layer)
            if layer in ends:
                holds = given * (layer < self.last - 1 and not self.of.put_off)
                yield Step(layer, there + put_off + self._of_block(layer) + stays + holds + self.columns * self.stream)
            put_off += self.plays[layer].put_off
        if self.first == 0 and self.trains:
            yield Step(0, there + put_off - self.before + self.shared[0] + self.stream + given + self._tables())
        yield Step(-1, put_off - self.saved + given)

    def _ends(self) -> set[int]:
        """Return, of the blocks that run again and of those that do not, the first two and the last two."""
        kinds = [[layer for layer in self.blocks if (layer in self.again) is runs] for runs in (True, False)]
        return {layer for kind in kinds for layer in (*kind[:2], *kind[-2:])}

    def _of_block(self, layer: int) -> int:
        play = self.plays[layer]
        return max(play.forward + self.stream, play.backward) if layer in self.again else play.backward

    def _tables(self) -> int:
        """Return the gradients of the embedding; of a tied one there is the head's, and the sum of the two."""
        config, is_tied = self.of.config, self.of.config.tied and self.is_last
        positions = (config.positions == "learned") * config.max_positions * config.model_dim * self.of.e
        return self.head * (1 + 2 * is_tied) + positions
