"""Write a run down so that nothing is ever half-written, and go on from it; what is damaged says so.

    DIR/rank-K.safetensors   the elements that rank K owns: tensors as raw bytes, which any reader of the format opens
    DIR/rank-K.json          which elements of which tensor, or slice of it, each piece is; the checksums of its bytes
    DIR/index.json           the run's state, and the checksums of all of these files and of itself

A checkpoint is logical: every tensor under its full name and shape, whatever layout wrote it; a reader takes what it
needs from the pieces, whoever wrote them, and however it was cut. All is written to a directory beside, synced, and
renamed in one move. Every byte stands under a checksum, and what is read is compared with it. Nothing is ever executed.

The room: disk (files that are never half there) · tensors (safetensors in blocks) · listed (the JSON files) · write
(all ranks together) · saver (while the training goes on) · read · across (of one cut what another has) · verify · keep
(which ones stay).
"""

from minispeed.checkpoint.disk import LEFTOVERS, discard, remove, standing, write_whole
from minispeed.checkpoint.keep import to_delete
from minispeed.checkpoint.listed import FORMATS, INDEX, Index, Piece, read_index
from minispeed.checkpoint.read import Checkpoint
from minispeed.checkpoint.saver import Saver
from minispeed.checkpoint.verify import checkpoints_in, is_checkpoint, newest_whole, problems
from minispeed.checkpoint.write import save

__all__ = [
    "FORMATS",
    "INDEX",
    "LEFTOVERS",
    "Checkpoint",
    "Index",
    "Piece",
    "Saver",
    "discard",
    "checkpoints_in",
    "is_checkpoint",
    "newest_whole",
    "problems",
    "read_index",
    "remove",
    "save",
    "standing",
    "to_delete",
    "write_whole",
]
