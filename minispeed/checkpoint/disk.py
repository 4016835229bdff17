"""Put files on the disk so that at any moment what stood there before, or what is new, stands there whole.

    write to .NAME.writing -> sync -> rename to NAME -> sync the folder

A rename replaces a file in one move, but no directory that holds something: that is first moved away, to `.NAME.old`. A
crash between these two moves leaves no NAME: `standing` then finds what stood there, and the next move cleans up.

Which calls survive a crash: Pillai et al. 2014.  https://www.usenix.org/conference/osdi14/technical-sessions/presentation/pillai
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minispeed.errors import UserError

LEFTOVERS = (".writing", ".old", ".removing")  # what a crash may leave, as `.NAME` and one of these


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a path beside `target` and move the result, file or directory, into its place.

    Raises  UserError naming the disk's free bytes when writing fails; what stood at `target` is then untouched
    """
    aside = aside_of(target)
    with sentence_for(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove(aside)
            write(aside)
            for path in [*(aside.iterdir() if aside.is_dir() else ()), aside]:
                sync(path)
            move(aside, target)
        except BaseException:
            remove(aside)
            raise


def aside_of(target: Path) -> Path:
    """Return where a file or directory is written before it is moved into its place."""
    return target.with_name(f".{target.name}.writing")


def standing(target: Path) -> Path:
    """Return the path at which `target` is to be read: another only if a crash came between two renames."""
    old = target.with_name(f".{target.name}.old")
    return old if old.exists() and not target.exists() else target


def move(aside: Path, target: Path) -> None:
    """Put what was written aside, and synced, into its place."""
    old = target.with_name(f".{target.name}.old")
    if not aside.is_dir():
        os.replace(aside, target)
    elif not target.exists():
        aside.rename(target)
    else:
        remove(old)
        target.rename(old)
        try:
            aside.rename(target)
        except BaseException:
            old.rename(target)
            raise
    sync(target.parent)
    remove(old)


def sync(path: Path) -> None:
    """Return once a file's bytes, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(directory: Path) -> None:
    """Delete a directory so that a crash does not leave half of it under its name."""
    leaving = directory.with_name(f".{directory.name}.removing")
    remove(leaving)
    directory.rename(leaving)
    remove(leaving)


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def sentence_for(target: Path) -> Iterator[None]:
    """Turn an error of the disk into a sentence."""
    try:
        yield
    except OSError as error:
        there = next(path for path in (target, *target.parents) if path.exists())
        free = shutil.disk_usage(there).free
        raise UserError(
            f"could not write {target}: {error} ({free / 1e6:.0f} MB free); what stood there before is whole",
            fix="free some disk, or --out on another",
        ) from error
