"""Write a run down so that nothing is ever half-written, and go on from it.

A checkpoint is logical: every tensor under its full name and shape, whatever layout wrote it. `index.json` says in
which file and at which elements of its flat form each piece of each tensor lies, and holds the run's state; the
pieces are safetensors. Today one rank writes one piece per tensor.

Nothing is ever half-written: all is written to a directory beside, synced, and renamed in one move.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minispeed.errors import UserError

INDEX, PIECES = "index.json", "rank-00000.safetensors"
FORMAT = 1


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a path beside `target` and move the result, file or directory, into its place.

    Raises  UserError naming the disk's free bytes when writing fails; what stood at `target` is then untouched
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.writing")
    try:
        remove(aside)
        write(aside)
        _sync(aside)
        if aside.is_dir() and target.exists():
            old = target.with_name(f".{target.name}.old")
            remove(old)
            target.rename(old)
            aside.rename(target)
            remove(old)
        else:
            os.replace(aside, target)
    except (OSError, SafetensorError) as error:
        remove(aside)
        free = shutil.disk_usage(target.parent).free
        raise UserError(
            f"could not write {target}: {error} ({free / 1e6:.0f} MB free); what stood there before is whole",
            fix="free some disk, or --out on another",
        ) from error
    except BaseException:
        remove(aside)
        raise


def save(directory: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint.

    Reads   tensors by logical name, any shapes and dtypes; state, what JSON can hold
    Writes  `directory`, replaced in one move if it was there
    """
    index = {
        "format": FORMAT,
        "state": dict(state),
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "pieces": [{"file": PIECES, "elements": [0, tensor.numel()]}],
            }
            for name, tensor in tensors.items()
        },
    }

    def write(aside: Path) -> None:
        aside.mkdir()
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, aside / PIECES)
        (aside / INDEX).write_text(json.dumps(index, indent=1) + "\n")

    write_whole(directory, write)


def load(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the state of a checkpoint.

    Raises  UserError naming the file if one is missing, cut short, or not what the index says
    """
    index = _read_index(directory)
    try:
        tensors = load_file(directory / PIECES)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory / PIECES} cannot be read: {error}", fix="another checkpoint of the run") from error
    for name, entry in index["tensors"].items():
        if name not in tensors or list(tensors[name].shape) != entry["shape"]:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            raise UserError(f"{directory}: {name} should be {entry['shape']}, found {found}", fix="another checkpoint")
    return tensors, index["state"]


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    try:
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            raise UserError(f"{path} is of format {index['format']}, this version reads {FORMAT}", fix="its version")
        return index
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint at {directory}", fix="--save-every N in the next run") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a checkpoint's index: {error}", fix="another checkpoint of the run") from error


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until the bytes of a file, or of a directory's files, are on the disk."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
