"""Read a HuggingFace folder's tensors as parameters of ours: any slice of any parameter, and of the files no more.

    parameters/blocks.0.attention.qkv.weight, slice 1 of 8   ->   rows of q_proj, of k_proj and of v_proj

So each rank of a layout reads what it holds, and nobody the whole model: a `Source`, as a checkpoint is one. What is
in the files and not in the model, or the other way round, is an error before anything is read.

The files: https://huggingface.co/docs/safetensors
"""

import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.hf.config import family_in, read_config
from minispeed.model.hf.weights import EMBEDDING, THEIR_HEAD, Names, Stored, names_of, stored
from minispeed.placement import WHOLE, Shard, Slice, cut

PREFIX = "parameters/"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "BF16", "F16")
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # of a repository: weights in one form, and text


def resolve(name: str) -> Path:
    """Return the folder of a model: `name` itself, or what a HuggingFace hub has under that name, downloaded.

    Raises  UserError if it is neither
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        what = f"{name!r} is no folder, and huggingface_hub, which could fetch it, is not installed"
        raise UserError(what, fix="a folder with config.json and *.safetensors") from error
    try:
        return Path(hub.snapshot_download(name, allow_patterns=WANTED))
    except (OSError, ValueError) as error:  # the hub's own errors are kinds of these
        what = f"{name!r} is no folder, and the hub did not give it: {error}"
        raise UserError(what, fix="a folder with config.json and *.safetensors") from error


def load(
    folder: Path, *, attention: str = "fused", dtype: torch.dtype | None = None, seq: int | None = None, **changes: Any
) -> GPT:
    """Return the whole model.

    dtype    of all parameters; None: the embedding's in the files
    changes  fields of the configuration
    Raises   UserError as `read_config` and `HFSource`
    """
    config = read_config(folder, seq=seq, attention=attention, **changes)
    source = HFSource(folder, config)
    model = GPT(config, given={name: source.tensor(name) for name in source.parameters})
    return model.to(dtype or model.embed.tokens.weight.dtype)


class HFSource:
    """The parameters of a HuggingFace folder, by our names after "parameters/", in our shapes.

    shapes      name -> shape
    bytes_read  of tensors, so far
    """

    def __init__(self, folder: Path, config: GPTConfig | None = None) -> None:
        """Read the lists of tensors, no tensors; but where a head that is tied is there all the same, compare it.

        config  what the files are to fit; None: what config.json says
        Raises  UserError naming the first tensor that is missing, too much, or of another shape
        """
        self.folder, self.bytes_read = folder, 0
        self.config = config or read_config(folder)
        self._files = _open(folder)
        family = family_in(folder)
        names = names_of(family)
        base = names.base if any(name.startswith(names.base) for name in self._files) else ""
        self.parameters: dict[str, Stored] = stored(self.config, family, base=base)
        self.shapes = {PREFIX + name: of.shape for name, of in self.parameters.items()}
        self._check(names)

    def _check(self, names: Names) -> None:
        """Compare what there is with what there should be."""
        wanted = {name: shape for of in self.parameters.values() for name, shape in of.shapes().items()}
        for name, shape in wanted.items():
            if name not in self._files:
                raise UserError(f"{self.folder} has no tensor {name}", fix="all files of the model")
            held = self._files[name].get_slice(name)
            if held.get_dtype() not in FLOATS:
                what = (
                    f"{self.folder}: {name} holds numbers of kind {held.get_dtype()}, and their scale is not read here"
                )
                raise UserError(what, fix=f"the model in one of {', '.join(FLOATS)}")
            found = tuple(held.get_shape())
            if found != shape:
                what = f"{self.folder}: {name} has the shape {found}, and config.json says {shape}"
                raise UserError(what, fix="files of one model")
        for name in sorted(self._files.keys() - wanted.keys()):
            if name == THEIR_HEAD and self.config.tied:
                self._check_head()
            elif not names.harmless.fullmatch(name):
                what = f"{self.folder} has a tensor {name}, which a model with this config.json has not"
                raise UserError(what, fix="files of one model")

    def _check_head(self) -> None:
        (embedding,) = self.parameters[EMBEDDING].names
        head, tokens = (self._take(name, (slice(None),)) for name in (THEIR_HEAD, embedding))
        if not torch.equal(head, tokens):
            what = f"{self.folder}: tie_word_embeddings is true, and {THEIR_HEAD} differs from {embedding}"
            raise UserError(what, fix='"tie_word_embeddings": false in config.json')

    def tensor(self, name: str) -> Tensor:
        """Return a whole parameter, in its shape."""
        shape = self.parameters[name].shape
        found = self.read(PREFIX + name, Interval(0, prod(shape)))
        assert found is not None
        return found.view(shape)

    def read(self, name: str, elements: Interval, part: Slice = WHOLE) -> Tensor | None:
        """Return some elements of the flattened parameter `name`, or of a slice of it; None where there is no such one.

        Reads    the rows of the slice that hold them, of each row what is in the slice
        Returns  (elements.size,), in the files' dtype
        Raises   UserError if a file is damaged
        """
        of = self.parameters.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
        if of is None:
            return None
        if not elements.size:
            return torch.zeros(0)
        rows, *columns = (_places(length, dim, part) for dim, length in enumerate(of.shape))
        width = prod(map(len, columns))
        first, last = elements.start // width, -(-elements.stop // width)
        held = [rows[first:last], *columns]
        found = torch.zeros([len(places) for places in held], dtype=self._dtype(of))
        for runs in product(*map(_runs, held)):
            found[tuple(slice(begin, begin + span.size) for begin, span in runs)] = self._box(of, [s for _, s in runs])
        return found.flatten()[slice(*elements.shift(-first * width))]

    def _dtype(self, of: Stored) -> torch.dtype:
        nothing: Tensor = self._files[of.names[0]].get_slice(of.names[0])[:0]
        return nothing.dtype

    def _box(self, of: Stored, box: Sequence[Interval]) -> Tensor:
        """Return neighbouring elements of a parameter, in every dim those of an interval."""
        rows, *columns = box
        begin, parts = 0, []
        for name, height in zip(of.names, of.rows, strict=True):
            here = rows.meet(Interval(begin, begin + height)).shift(-begin)
            if here.size:
                wanted = tuple(slice(*span) for span in (here, *columns))
                parts.append(self._take(name, wanted[::-1]).T if of.is_transposed else self._take(name, wanted))
            begin += height
        return torch.cat(parts)

    def _take(self, name: str, wanted: tuple[slice, ...]) -> Tensor:
        try:
            found: Tensor = self._files[name].get_slice(name)[wanted]
        except SafetensorError as error:
            raise UserError(f"{self.folder}: {name} cannot be read: {error}", fix="the files once more") from error
        self.bytes_read += found.nbytes
        return found


def _open(folder: Path) -> dict[str, Any]:
    """Return the file that has each tensor, open."""
    found: dict[str, Any] = {}
    for name in _files(folder):
        try:
            file = safe_open(folder / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / name} cannot be read: {error}", fix="the files once more") from error
        found |= dict.fromkeys(file.keys(), file)
    return found


def _files(folder: Path) -> list[str]:
    """Return the names of the files."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        what = f"{folder} has neither {WEIGHTS} nor {INDEX}"
        raise UserError(what, fix="model.save_pretrained(folder), which writes safetensors")
    try:
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / INDEX} cannot be read: {error!r}", fix="the files once more") from error


def _places(length: int, dim: int, part: Slice) -> Tensor:
    """Return, for each place along a dim of a slice, its number in the whole, counted from 1; 0 where it is padding."""
    numbers = torch.arange(1, length + 1)
    if not isinstance(part.place, Shard) or part.place.dim != dim:
        return numbers
    return cut(numbers, replace(part.place, dim=0), rank=part.index, size=part.count)


def _runs(places: Tensor) -> list[tuple[int, Interval]]:
    """Return the intervals of the whole that lie here in one piece, each with where it begins here; no padding."""
    edges = [0, *((places.diff() != 1).nonzero().flatten() + 1).tolist(), len(places)]
    firsts = places.tolist()
    return [
        (begin, Interval(firsts[begin], firsts[begin] + end - begin).shift(-1))
        for begin, end in pairwise(edges)
        if firsts[begin]
    ]
