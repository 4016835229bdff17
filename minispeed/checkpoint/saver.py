"""Write checkpoints while the training goes on: a step waits for a copy in memory, not for the disk.

    save:  copy this rank's pieces -> a thread writes and hashes them, aside
    wait:  join the thread -> all ranks agree -> rank 0 moves the checkpoint, and what points to it, into its place

No thread speaks to another rank: two conversations at once over the same group would mix. So a checkpoint counts only
from the `wait` after it on, which the next save does, and the end of the training; a crash before costs one checkpoint.

Mohan et al. 2021, section 4, snapshot and persist.  https://www.usenix.org/conference/fast21/presentation/mohan
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minispeed.checkpoint.listed import Piece
from minispeed.checkpoint.write import Part, finish, part_of, write_part
from minispeed.collective.group import Group, SoloGroup


class Writing(NamedTuple):
    """A checkpoint that a thread is writing; its part is complete once the thread has ended."""

    part: Part
    directory: Path
    then: Callable[[], object]
    thread: threading.Thread


class Saver:
    """Saves one checkpoint at a time in the background; every rank has one, and calls it alike.

    Holds  from the first save on, a copy of this rank's pieces in CPU memory, used again by the next
    """

    def __init__(self, group: Group | None = None) -> None:
        self.group = group or SoloGroup()
        self._copies: dict[tuple[object, ...], Tensor] = {}
        self._writing: Writing | None = None

    def save(
        self,
        directory: Path,
        pieces: Sequence[Piece],
        state: Mapping[str, Any],
        then: Callable[[], object] = lambda: None,
    ) -> None:
        """Begin to write a checkpoint of the present values; see `minispeed.checkpoint.save`.

        Raises  what `wait` raises, of the save before
        """
        self.wait()
        part, mine = part_of(state), list[Piece]()
        try:
            mine = self._copied(pieces)
        except BaseException as error:
            part.error = part.error or error
        work = partial(write_part, part, directory, mine, self.group.rank)
        thread = threading.Thread(target=work, name=f"writing {directory.name}")
        self._writing = Writing(part, directory, then, thread)
        thread.start()

    def wait(self) -> None:
        """Return once the last save stands in its place; at once if there is none. Every rank calls this.

        Raises  UserError, the same on every rank, if any rank could not write; what stood there before is untouched
        """
        if self._writing is None:
            return
        part, directory, then, thread = self._writing
        thread.join()
        self._writing = None
        finish(part, directory, self.group, then)

    def _copied(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the pieces that this rank writes, as copies in CPU memory; that of the last save is used again."""
        before, self._copies, found = self._copies, {}, []
        for piece in (piece for piece in pieces if not piece.is_copy):
            x = piece.tensor.detach().flatten()
            which = (piece.name, piece.part, piece.elements, x.dtype)
            copy = before.pop(which, None)
            if copy is None:
                copy = torch.empty(x.numel(), dtype=x.dtype, pin_memory=x.is_cuda)
            self._copies[which] = copy.copy_(x, non_blocking=True)
            found.append(piece._replace(tensor=copy))
        for device in {piece.tensor.device for piece in pieces if piece.tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return found
