"""What does a checkpoint cost, beside torch.save and torch.distributed.checkpoint, and how long does a step wait?

    python benchmarks/checkpoint_speed.py [--megabytes 200] [--tensors 40] [--folder DIR]

One process, fp32 tensors of equal size. All write the same state to the same disk and sync it: torch.save does not by
itself, so the file is synced after it; the other two do. Ours also hashes every byte, and compares every block with its
CRC when it reads. All read files that the system still holds in memory, and what was read must equal what was written:
"load" is into the tensors of a run that stands already, as going on with it does, where torch.load needs a copy more;
"load anew" is into new memory, and no further. torch.load with mmap=True reads no file before it copies, and nobody's
ratio is to it. Contestants take turns, in an order that turns by one each time; figures are medians of the ratio to the
fastest other in the same turn. A save in the background is timed until the training may go on, which is the stall; what
it then takes in all is until `wait` has returned.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from report import report

from minispeed.checkpoint import Checkpoint, Piece, Saver, save
from minispeed.layout import Interval

WARM_UP, TURNS = 1, 9
State: TypeAlias = dict[str, Tensor]


class Contestant(NamedTuple):
    """How to write a state into an empty folder, to read it into tensors that stand, and into new memory."""

    write: Callable[[State, Path], object]
    load: Callable[[State, Path], object]
    anew: Callable[[State, Path], State]


def pieces_of(state: State) -> list[Piece]:
    """Return the tensors, each whole."""
    return [Piece(name, tuple(x.shape), Interval(0, x.numel()), x) for name, x in state.items()]


def write_ours(state: State, folder: Path) -> None:
    save(folder / "ours", pieces_of(state), {})


def load_ours(into: State, folder: Path) -> None:
    Checkpoint(folder / "ours").fill(pieces_of(into))


def anew_ours(state: State, folder: Path) -> State:
    found = {name: torch.empty_like(x) for name, x in state.items()}
    load_ours(found, folder)
    return found


def write_torch(state: State, folder: Path) -> None:
    torch.save(state, folder / "state.pt")
    with (folder / "state.pt").open("rb") as stream:
        os.fsync(stream.fileno())


def load_torch(into: State, folder: Path, *, mmap: bool = False) -> None:
    found = torch.load(folder / "state.pt", mmap=mmap)
    for name, x in into.items():
        x.copy_(found[name])


def anew_torch(state: State, folder: Path, *, mmap: bool = False) -> State:
    return dict(torch.load(folder / "state.pt", mmap=mmap))


def write_distributed(state: State, folder: Path) -> None:
    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)


def load_distributed(into: State, folder: Path) -> None:
    dcp.load(into, checkpoint_id=folder / "dcp", no_dist=True)


def anew_distributed(state: State, folder: Path) -> State:
    found = {name: torch.empty_like(x) for name, x in state.items()}
    load_distributed(found, folder)
    return found


warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
OURS, STALL, IN_ALL = "minispeed", "in the background, the stall", "in the background, in all"
MAPPED = "torch.load, mmap"
CONTESTANTS = {
    OURS: Contestant(write_ours, load_ours, anew_ours),
    "torch.save, synced": Contestant(write_torch, load_torch, anew_torch),
    "torch.distributed.checkpoint": Contestant(write_distributed, load_distributed, anew_distributed),
    MAPPED: Contestant(write_torch, partial(load_torch, mmap=True), partial(anew_torch, mmap=True)),
}


class Times(NamedTuple):
    """Seconds of one contestant in one turn; None for what it did not do."""

    save: float
    load: float | None = None
    anew: float | None = None


def turn(name: str, state: State, folder: Path) -> tuple[Times, int]:
    """Time one contestant; return its times, and the bytes that it left."""
    write, load, anew = CONTESTANTS[name]
    into = {key: torch.full_like(x, -1.0) for key, x in state.items()}
    took = [timed(lambda: write(state, folder)), timed(lambda: load(into, folder))]
    check(name, into, state)
    into.clear()
    start = time.perf_counter()
    found = anew(state, folder)
    took.append(time.perf_counter() - start)
    check(name, found, state)
    left = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Times(*took), left


def timed(work: Callable[[], object]) -> float:
    """Return how many seconds something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def check(name: str, found: State, state: State) -> None:
    """Raise AssertionError unless what was read is what was written."""
    assert found.keys() == state.keys() and all(torch.equal(found[key], x) for key, x in state.items()), name


def turn_in_background(state: State, folder: Path, saver: Saver) -> tuple[Times, Times]:
    """Time a save in the background: until the training may go on, and until the checkpoint stands."""
    start = time.perf_counter()
    saver.save(folder / "ours", pieces_of(state), {})
    stall = time.perf_counter() - start
    saver.wait()
    return Times(stall), Times(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200, help="of the state")
    parser.add_argument("--tensors", type=int, default=40)
    parser.add_argument("--folder", type=Path, help="on the disk that is meant; where temporary files go when absent")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = options.megabytes * 1_000_000 // 4 // options.tensors
    state = {f"blocks.{index}.weight": torch.randn(size) for index in range(options.tensors)}
    times: dict[str, list[Times]] = {name: [] for name in (*CONTESTANTS, STALL, IN_ALL)}
    left: dict[str, int] = {}
    order, saver = [*CONTESTANTS, STALL], Saver()
    for index in range(WARM_UP + TURNS):
        for name in order:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                if name == STALL:
                    spent = dict(zip((STALL, IN_ALL), turn_in_background(state, Path(folder), saver)))
                else:
                    one, left[name] = turn(name, state, Path(folder))
                    spent = {name: one}
            for what, took in spent.items() if index >= WARM_UP else ():
                times[what].append(took)
        order = order[1:] + order[:1]
    report(
        "checkpoint_speed",
        [row(name, times) | {"bytes": left.get(name)} for name in times],
        megabytes=options.megabytes,
        tensors=options.tensors,
        turns=TURNS,
    )


def row(name: str, times: dict[str, list[Times]]) -> dict[str, Any]:
    """Return the medians of a contestant's times, and of their ratios to the fastest other of the same turn."""
    found: dict[str, Any] = {"contestant": name}
    for what in Times._fields:
        mine = [getattr(one, what) for one in times[name]]
        if None in mine:
            found |= {f"{what} ms": None, f"{what} of the best other's": None, f"{what} lowest": None}
            found[f"{what} highest"] = None
            continue
        others = [other for other in CONTESTANTS if other not in (name, OURS, MAPPED)]
        best = [min(getattr(times[other][index], what) for other in others) for index in range(TURNS)]
        ratios = [a / b for a, b in zip(mine, best)]
        found |= {f"{what} ms": statistics.median(mine) * 1e3, f"{what} of the best other's": statistics.median(ratios)}
        found |= {f"{what} lowest": min(ratios), f"{what} highest": max(ratios)}
    own = [one.save / ours.save for one, ours in zip(times[name], times[OURS])]
    return found | {"save of minispeed's": statistics.median(own)}


if __name__ == "__main__":
    main()
