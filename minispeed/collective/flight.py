"""Remember a rank's last operations, for the day it hangs.

A distributed run that stops seldom stops where the mistake is: most ranks wait, and say only that. So each
rank notes every operation before it starts, with the user's line; what it noted last is printed when it gives
up, and lies in a file that outlives it, where the launcher looks for the one rank that was not waiting.
"""

import mmap
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from minispeed.collective.group import CollectiveError, call_site

_FILE_SIZE = 8192  # bytes
_TEXT_SIZE = 1000  # characters: an exchange may list many messages


@dataclass
class Operation:
    """One collective of this rank: `state` is begun, waiting (for the other ranks), done or failed."""

    number: int
    state: str
    text: str
    site: str

    def __str__(self) -> str:
        return f"{self.number} ({self.state}) {self.text} at {self.site}"


class FlightRecorder:
    """The last operations of one rank."""

    def __init__(self, rank: int, path: Path | None = None, *, keep: int = 6) -> None:
        """Keep the last `keep` operations; with a path, the last of all in that file too."""
        self.rank = rank
        self.operations: deque[Operation] = deque(maxlen=keep)
        self._memory = None
        if path:
            path.write_bytes(b"\n" * _FILE_SIZE)
            with path.open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), _FILE_SIZE)  # outlives the process; no system call

    def begin(self, text: str) -> Operation:
        """Note that the user's code called a collective."""
        number = self.operations[-1].number + 1 if self.operations else 1
        operation = Operation(number, "begun", text, call_site())
        self.operations.append(operation)
        self._write(operation)
        return operation

    def become(self, operation: Operation, state: str) -> None:
        """Note that an operation went on."""
        operation.state = state
        self._write(operation)

    def give_up(self, operation: Operation, error: Exception) -> CollectiveError:
        """Print the last operations, and return what to raise: this one failed, or waited for too long."""
        self.become(operation, "failed")
        listing = "".join(f"\n  {past}" for past in self.operations)
        print(f"rank {self.rank} gave up; its last operations:{listing}", file=sys.stderr, flush=True)
        reason = str(error).strip().splitlines()[0]
        return CollectiveError(f"rank {self.rank} gave up in operation {operation}: {reason}")

    def _write(self, operation: Operation) -> None:
        if self._memory is not None:
            fields = (str(operation.number), operation.state, operation.text[:_TEXT_SIZE], operation.site)
            self._memory[:] = "\0".join(fields).encode().ljust(_FILE_SIZE, b"\n")[:_FILE_SIZE]


def last_operation(path: Path) -> Operation | None:
    """Return the operation that a rank noted last, or None if it never called a collective."""
    fields = path.read_text(errors="replace").rstrip("\n").split("\0") if path.exists() else []
    return Operation(int(fields[0]), *fields[1:]) if len(fields) == 4 else None
