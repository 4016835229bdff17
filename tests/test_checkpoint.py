"""Laws of the checkpoint: what goes in comes out, and nothing is ever half-written."""

import json

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed import checkpoint
from minispeed.errors import UserError

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64])
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(st.dictionaries(st.text("abc./", min_size=1, max_size=6), st.tuples(shapes, dtypes), max_size=4))
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path_factory, drawn):
    directory = tmp_path_factory.mktemp("run") / "step-1"
    tensors = {name: torch.arange(torch.Size(shape).numel()).view(shape).to(d) for name, (shape, d) in drawn.items()}
    checkpoint.save(directory, tensors, {"step": 3, "cursor": [1, 2]})
    loaded, state = checkpoint.load(directory)
    assert state == {"step": 3, "cursor": [1, 2]} and loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in tensors.items())
    index = json.loads((directory / "index.json").read_text())
    assert all(index["tensors"][name]["shape"] == list(t.shape) for name, t in tensors.items())


def test_a_failed_write_leaves_what_was_there(tmp_path):
    directory = tmp_path / "step-1"
    checkpoint.save(directory, {"w": torch.ones(2)}, {"step": 1})
    with pytest.raises(TypeError):
        checkpoint.save(directory, {"w": torch.zeros(2)}, {"step": {1, 2}})  # a set is no JSON: fails half-way

    def full(aside):
        aside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left.*MB free.*is whole"):
        checkpoint.write_whole(directory, full)
    assert checkpoint.load(directory)[0]["w"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_saving_again_replaces_whole(tmp_path):
    for value in (1, 2):
        checkpoint.save(tmp_path / "last", {"w": torch.full((2,), value)}, {"step": value})
    assert checkpoint.load(tmp_path / "last")[1] == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint at"):
        checkpoint.load(tmp_path / "none")
    directory = tmp_path / "step-1"
    checkpoint.save(directory, {"w": torch.ones(2, 3)}, {})
    piece, index = directory / checkpoint.PIECES, directory / checkpoint.INDEX
    whole = piece.read_bytes()
    piece.write_bytes(whole[:-3])
    with pytest.raises(UserError, match="rank-00000.safetensors cannot be read"):
        checkpoint.load(directory)
    piece.write_bytes(whole)
    index.write_text(index.read_text().replace("2,\n    3", "3,\n    3"))
    with pytest.raises(UserError, match=r"w should be \[3, 3\], found \[2, 3\]"):
        checkpoint.load(directory)
    index.write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(directory)
    index.write_text('{"format"')
    with pytest.raises(UserError, match="not a checkpoint's index"):
        checkpoint.load(directory)
