"""What does a checkpoint cost, beside torch.save and torch.distributed.checkpoint, and how long does a step wait?

    python benchmarks/checkpoint_speed.py [--megabytes 200] [--tensors 40] [--folder DIR]

One process, fp32 tensors of equal size. All write the same state to the same disk and sync it: torch.save does not by
itself, so the file is synced after it; the other two do. Ours also hashes every byte, and compares every block with its
CRC when it reads. All read into new memory, from files that the system still holds in memory; what was read must equal
what was written. Contestants take turns, in an order that turns by one each time; figures are medians of the ratio to
the fastest other in the same turn. A save in the background is timed until the training may go on, which is the stall;
what it then takes in all is until `wait` has returned.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
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
    """Two ways: of writing a state into an empty folder, and of reading it into new memory."""

    write: Callable[[State, Path], object]
    read: Callable[[State, Path], State]


def pieces_of(state: State) -> list[Piece]:
    """Return the tensors, each whole."""
    return [Piece(name, tuple(x.shape), Interval(0, x.numel()), x) for name, x in state.items()]


def write_ours(state: State, folder: Path) -> None:
    save(folder / "ours", pieces_of(state), {})


def read_ours(state: State, folder: Path) -> State:
    stored = Checkpoint(folder / "ours")
    return {name: x for name in stored.shapes if (x := stored.tensor(name)) is not None}


def write_torch(state: State, folder: Path) -> None:
    torch.save(state, folder / "state.pt")
    with (folder / "state.pt").open("rb") as stream:
        os.fsync(stream.fileno())


def read_torch(state: State, folder: Path) -> State:
    return dict(torch.load(folder / "state.pt"))


def write_distributed(state: State, folder: Path) -> None:
    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)


def read_distributed(state: State, folder: Path) -> State:
    found = {name: torch.empty_like(x) for name, x in state.items()}
    dcp.load(found, checkpoint_id=folder / "dcp", no_dist=True)
    return found


warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
OURS, STALL, IN_ALL = "minispeed", "in the background, the stall", "in the background, in all"
CONTESTANTS = {
    OURS: Contestant(write_ours, read_ours),
    "torch.save, synced": Contestant(write_torch, read_torch),
    "torch.distributed.checkpoint": Contestant(write_distributed, read_distributed),
}


class Times(NamedTuple):
    """Seconds of one contestant in one turn; `load` is None where nothing was loaded."""

    save: float
    load: float | None = None


def turn(name: str, state: State, folder: Path) -> tuple[Times, int]:
    """Time one contestant; return its times, and the bytes that it left."""
    start = time.perf_counter()
    CONTESTANTS[name].write(state, folder)
    saved = time.perf_counter()
    found = CONTESTANTS[name].read(state, folder)
    loaded = time.perf_counter()
    assert found.keys() == state.keys() and all(torch.equal(found[key], x) for key, x in state.items()), name
    left = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Times(saved - start, loaded - saved), left


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
        others = [other for other in CONTESTANTS if other not in (name, OURS)]
        best = [min(getattr(times[other][index], what) for other in others) for index in range(TURNS)]
        ratios = [a / b for a, b in zip(mine, best)]
        found |= {f"{what} ms": statistics.median(mine) * 1e3, f"{what} of the best other's": statistics.median(ratios)}
        found |= {f"{what} lowest": min(ratios), f"{what} highest": max(ratios)}
    own = [one.save / ours.save for one, ours in zip(times[name], times[OURS])]
    return found | {"save of minispeed's": statistics.median(own)}


if __name__ == "__main__":
    main()
