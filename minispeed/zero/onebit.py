"""Sum one unit's gradients over the ranks with one bit for each number, and with error feedback.

Numbers of one bit do not add up on the way, so each rank sums a part of them for all (Tang et al. 2021, section 4.1,
figure 2):

    1. each rank says its gradients, part r to rank r             all-to-all of signs and scales; owes the rest
    2. rank r adds what all have said of part r
    3. each rank says its part of the sum, where it is not cut    all-gather of signs and scales; owes the rest

Who owes has lost nothing, whatever the ranks said: see `compress.py`. What is owed changes when the update is made; of
a step that was skipped nothing was said.

1-bit Adam, Tang et al. 2021.  https://arxiv.org/abs/2102.02888
Letters: N ranks, S elements of a shard, P = N S elements of the padded buffer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minispeed.collective.group import Work
from minispeed.errors import UserError
from minispeed.layout import FlatLayout
from minispeed.zero.compress import codes
from minispeed.zero.summing import Compression, InFull, PlainSum, Wire


@dataclass(frozen=True, kw_only=True)
class OneBit:
    """Gradients travel as signs and scales.

    freeze_step  the first so many updates, also after a checkpoint is loaded, are made in full
    block        a scale is of this many elements at most, of one parameter
    """

    freeze_step: int = 0
    block: int = 256

    def summing(self, wire: Wire) -> "OneBitSum":
        """Return the compressed all-reduce, or its first half."""
        return OneBitSum(wire, self)

    def check(self, stage: int, dtypes: Sequence[torch.dtype]) -> None:
        """Refuse where a rank would keep what ZeRO has cut, and where the loss scale changes what is owed."""
        if self.block < 1 or self.freeze_step < 0:
            what = f"one-bit gradients in blocks of {self.block}, after {self.freeze_step} updates"
            raise UserError(what, fix="a block of 1 or more, freeze_step of 0 or more")
        if stage >= 2:
            what = f"one-bit gradients at ZeRO stage {stage}: each rank keeps what it owes of every gradient, whole"
            raise UserError(what, fix="stage 1 or 0, or gradients in full")
        if torch.float16 in dtypes:
            what = "one-bit gradients beside fp16: the loss scale changes, and what is owed is in an old one"
            raise UserError(what, fix="bf16, or gradients in full")


def compression_named(name: str, freeze_step: int = 0) -> Compression:
    """Return the compression that options call "none" or "onebit"."""
    named: dict[str, Compression] = {"none": InFull(), "onebit": OneBit(freeze_step=freeze_step)}
    return named[name]


class OneBitSum:
    """Sum in one bit for each number, after a warm-up in full.

    num_updates  that were made
    owed         of my gradients, (N S,); None while nothing is
    owed_by_sum  of my part of the sum, (S,), where the sum is not cut; likewise
    """

    def __init__(self, wire: Wire, how: OneBit) -> None:
        self.wire, self.how, self.plain = wire, how, PlainSum(wire)
        self.layout = FlatLayout(wire.layout.shapes, wire.group.size)  # of the parts that ranks sum for all
        chunks = [_blocks(self.layout, rank, how.block) for rank in range(wire.group.size)]
        self.codes = codes(chunks, wire.exact)
        self.num_updates = 0
        self.owed: Tensor | None = None
        self.owed_by_sum: Tensor | None = None
        self._next: tuple[Tensor | None, Tensor | None] | None = None  # both, if the update is made

    def start(self, full: Tensor) -> tuple[Work, Tensor]:
        """Say my gradients, and what I owe.

        Sends  a message (`Code`) to each other rank, (N - 1) num_bytes; where the sum is not cut, twice
        """
        wire = self.wire
        owed, owed_by_sum = self._next or (self.owed, self.owed_by_sum)
        if self.num_updates < self.how.freeze_step:
            self._next = owed, owed_by_sum
            return self.plain.start(full)
        given = torch.zeros(self.layout.size, dtype=wire.exact, device=full.device)
        given[: self.layout.total] = full[: self.layout.total]
        given.div_(wire.predivide)
        if owed is not None:
            given.add_(owed)
        parts = given.view(wire.group.size, -1)
        messages = torch.stack([code.write(part) for code, part in zip(self.codes, parts)])
        for code, part, message in zip(self.codes, parts, messages):
            part.sub_(code.read(message))
        self._next = given, owed_by_sum
        arrived = torch.empty_like(messages)
        size = wire.layout.size if wire.whole else wire.layout.shard_size
        mine = given.new_empty(size)
        return _Said(wire.group.all_to_all(arrived, messages), messages, arrived, mine, self), mine

    def finish(self, arrived: Tensor, mine: Tensor) -> None:
        """Add what all have said of my part; say the sum where all need all of it.

        Reads   arrived, (N, num_bytes)
        Writes  mine, (P,) or (S,)
        """
        wire, code = self.wire, self.codes[self.wire.group.rank]
        total = code.read(arrived[0])
        for message in arrived[1:]:
            total += code.read(message)
        if not wire.whole:
            mine.copy_(total)
            return
        assert self._next is not None
        owed, owed_by_sum = self._next
        if owed_by_sum is not None:
            total.add_(owed_by_sum)
        said = code.write(total)
        self._next = owed, total - code.read(said)
        everyones = said.new_empty(arrived.shape)
        wire.group.all_gather(everyones, said).wait()
        whole = torch.cat([code.read(message) for code, message in zip(self.codes, everyones)])
        mine.copy_(whole[: mine.numel()])

    def keep(self) -> None:
        """The update is made: what is owed now is what it left."""
        if self._next is not None:
            self.owed, self.owed_by_sum = self._next
            self._next, self.num_updates = None, self.num_updates + 1

    def undo(self) -> None:
        """The step is dropped: what was owed before it is owed."""
        self._next = None

    def restart(self) -> None:
        """Owe nothing, and make the first updates in full again: what is owed is in no checkpoint."""
        self.owed = self.owed_by_sum = self._next = None
        self.num_updates = 0


def _blocks(layout: FlatLayout, rank: int, most: int) -> list[int]:
    """Return the lengths of the blocks of a shard: none reaches over two parameters, padding is one of its own."""
    lengths, end = list[int](), 0
    for piece in layout.pieces(rank):
        size, end = piece.shard.size, piece.shard.stop
        lengths += [min(most, size - start) for start in range(0, size, most)]
    return lengths + [layout.shard_size - end] * (end < layout.shard_size)


@dataclass
class _Said:
    """Messages under way, and what becomes of them."""

    work: Work
    messages: Tensor
    arrived: Tensor
    mine: Tensor
    of: OneBitSum

    def wait(self) -> None:
        self.work.wait()
        self.of.finish(self.arrived, self.mine)
