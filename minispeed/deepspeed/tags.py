"""Find a checkpoint among those of a folder, by its tag; where there is none of that tag, say which other is whole.

    DIR/TAG/             a checkpoint (`minispeed.checkpoint`)
    DIR/latest           the tag of the last one
    RUN/checkpoints/     such a folder of `minispeed sft`, in which `last` says the last one, `best` the best

https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html
"""

from pathlib import Path, PurePath

from minispeed.checkpoint import INDEX, newest_whole, standing
from minispeed.errors import UserError

LATEST = "latest"
POINTERS = (LATEST, "last")


def target_of(folder: str | Path, tag: str) -> Path:
    """Return where a checkpoint is to be written.

    Raises  UserError if that is not inside the folder: a checkpoint replaces what stood there before
    """
    if not str(folder):
        raise UserError("save_dir is empty", fix='save_dir="checkpoints"')
    parts = PurePath(tag).parts
    if not parts or ".." in parts or PurePath(tag).is_absolute() or tag == LATEST:
        raise UserError(f"the tag {tag!r} is no name for a checkpoint inside {folder}", fix='tag="last"')
    return Path(folder) / tag


def place_of(folder: Path, tag: str | None) -> Path:
    """Return where a checkpoint is.

    tag     its name, or that of a file that holds its name, as `best`; None: the last one's, or `folder` itself
    Raises  UserError if there is none, naming the newest that is whole
    """
    if tag is None and (folder / INDEX).exists():
        return folder
    if (folder / "checkpoints" / "last").is_file():
        folder = folder / "checkpoints"
    asked = next((name for name in POINTERS if (folder / name).is_file()), None) if tag is None else str(tag).strip()
    if asked is None:
        raise UserError(f"there is no {folder / LATEST}, which says the last checkpoint", fix=_others(folder))
    if (folder / asked).is_file():
        asked = (folder / asked).read_text(encoding="utf-8").strip()
    found = folder / asked
    if not (index := standing(found) / INDEX).exists():
        raise UserError(f"there is no checkpoint {asked} in {folder}: {index} is missing", fix=_others(folder))
    return found


def _others(folder: Path) -> str:
    """Return what to ask for: the newest checkpoint of a folder that is whole, and what else is there."""
    there = ", ".join(sorted(index.parent.name for index in folder.glob(f"*/{INDEX}")))
    if found := newest_whole(folder):
        return f'tag="{found.name}", the newest that is whole of {there}'
    return f"another folder: of {there} none is whole" if there else "the folder that save_checkpoint was given"
