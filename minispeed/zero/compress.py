"""Say a number with one bit, its sign, and owe the rest to the next time.

    given = gradient + owed                   what there is to say, (n,)
    said  = signs of it, times a scale        n bits, and a scale for each block: the mean size of the block's numbers
    owed  = given - said                      said later: error feedback

What was said so far and what is owed add up to all gradients there were, so nothing is lost, only late. Of all scales
the mean size leaves the least squares to owe. Blocks keep large numbers and small ones apart, and zeros stay zeros.

1-bit SGD, Seide et al. 2014, section 3 (https://www.isca-archive.org/interspeech_2014/seide14_interspeech.html);
the mean as the scale: EF-SignSGD, Karimireddy et al. 2019, section 4 (https://arxiv.org/abs/1901.09847).
Letters: n numbers in C blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BITS = 8  # of a byte


@dataclass(frozen=True)
class Code:
    """How a chunk of numbers becomes bytes: the scales of its blocks, then the signs, packed.

    lengths  of each block; together n
    blocks   for how many scales there is room: C or more, so that chunks of unlike blocks make equal messages
    dtype    of the numbers and their scales
    """

    lengths: tuple[int, ...]
    blocks: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of a message."""
        return self.blocks * self.dtype.itemsize + -(-sum(self.lengths) // BITS)

    @cached_property
    def _lengths(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int64)

    def write(self, x: Tensor) -> Tensor:
        """Return the message.  (n,) -> (num_bytes,) uint8"""
        signs, scales = compress(x, self._lengths.to(x.device))
        room = scales.new_zeros(self.blocks)
        room[: scales.numel()] = scales
        return torch.cat([room.view(torch.uint8), signs])

    def read(self, message: Tensor) -> Tensor:
        """Return what a message says.  (num_bytes,) uint8 -> (n,)"""
        after = self.blocks * self.dtype.itemsize
        scales = message[:after].clone().view(self.dtype)[: len(self.lengths)]  # a copy: a float starts at its multiple
        return decompress(message[after:], scales, self._lengths.to(message.device))


def codes(chunks: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Code]:
    """Return a code for each chunk, given the lengths of its blocks; their messages are of one size."""
    most = max(map(len, chunks))
    return [Code(tuple(lengths), most, dtype) for lengths in chunks]


def compress(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the signs of numbers, eight to a byte, and the mean size of each block.

    x        (n,), floating-point
    lengths  of the blocks, (C,), none of them 0, together n
    Returns  (n/8,) uint8, rounded up, and (C,): not finite where a number is not
    """
    scales = torch.segment_reduce(x.abs(), "mean", lengths=lengths, unsafe=True)  # unsafe: unchecked
    return pack(x >= 0), scales


def decompress(signs: Tensor, scales: Tensor, lengths: Tensor) -> Tensor:
    """Return the numbers that signs and scales say.  (n/8,) uint8, (C,), (C,) -> (n,)"""
    sizes = torch.repeat_interleave(scales, lengths)
    return torch.where(unpack(signs, sizes.numel()), sizes, -sizes)


def pack(bits: Tensor) -> Tensor:
    """Put eight bits in a byte, the first as its lowest.  (n,) bool -> (n/8,) uint8, rounded up"""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % BITS))
    return (padded.view(-1, BITS) << _places(bits)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """Return the bits again.  (n/8,) uint8 -> (n,) bool"""
    return ((packed[:, None] >> _places(packed)) & 1).bool().view(-1)[:n]


def _places(x: Tensor) -> Tensor:
    return torch.arange(BITS, dtype=torch.uint8, device=x.device)
