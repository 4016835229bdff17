"""Laws of the checkpoint: what goes in comes out, whoever wrote it, and nothing is ever half-written."""

import json

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed import checkpoint
from minispeed.checkpoint import Checkpoint, Piece
from minispeed.collective.threads import run_threads
from minispeed.errors import UserError
from minispeed.layout import FlatLayout, Interval

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64])
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def whole(tensors: dict[str, torch.Tensor]) -> list[Piece]:
    return [Piece(name, tuple(t.shape), Interval(0, t.numel()), t.flatten()) for name, t in tensors.items()]


@given(st.dictionaries(st.text("abc./", min_size=1, max_size=6), st.tuples(shapes, dtypes), max_size=4))
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path_factory, drawn):
    directory = tmp_path_factory.mktemp("run") / "step-1"
    tensors = {name: torch.arange(torch.Size(shape).numel()).view(shape).to(d) for name, (shape, d) in drawn.items()}
    checkpoint.save(directory, whole(tensors), {"step": 3, "cursor": [1, 2]})
    loaded = Checkpoint(directory)
    assert loaded.state == {"step": 3, "cursor": [1, 2]} and loaded.shapes.keys() == tensors.keys()
    for name, t in tensors.items():
        assert torch.equal(loaded.tensor(name), t) and (not t.numel() or loaded.tensor(name).dtype == t.dtype)
    assert loaded.tensor("nothing") is None


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), shapes, min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
)
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path_factory, drawn, writers, readers, copies):
    directory = tmp_path_factory.mktemp("run") / "step-1"
    tensors = {name: torch.randn(shape) for name, shape in drawn.items()}
    layout = FlatLayout.of(tensors, 1 if copies else writers)
    flat = layout.flatten(tensors, out=torch.empty(layout.size))

    def write(group) -> None:
        part = 0 if copies else group.rank
        mine = layout.shard(flat, part)
        is_copy = copies and group.rank > 0
        pieces = [Piece(n, drawn[n], e, mine[slice(*place)], is_copy) for n, e, place in layout.pieces(part)]
        checkpoint.save(directory, pieces, {}, group)

    run_threads(write, writers)
    stored = Checkpoint(directory)
    other = FlatLayout.of(tensors, readers)
    for rank in range(readers):
        for name, elements, _ in other.pieces(rank):
            assert torch.equal(stored.read(name, elements), tensors[name].flatten()[slice(*elements)])


def test_a_failed_write_leaves_what_was_there(tmp_path):
    directory = tmp_path / "step-1"
    checkpoint.save(directory, whole({"w": torch.ones(2)}), {"step": 1})
    with pytest.raises(TypeError):
        checkpoint.save(directory, whole({"w": torch.zeros(2)}), {"step": {1, 2}})  # a set is no JSON

    def full(aside):
        aside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left.*MB free.*is whole"):
        checkpoint.write_whole(directory, full)
    assert Checkpoint(directory).tensor("w").tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_one_rank_that_cannot_write_fails_all_and_nothing_is_left(tmp_path):
    def write(group) -> str:
        tensor = torch.ones(2) if group.rank != 1 else "no tensor"
        try:
            checkpoint.save(tmp_path / "step-1", [Piece(f"w{group.rank}", (2,), Interval(0, 2), tensor)], {}, group)
        except Exception as error:
            return str(error)
        return "saved"

    said = run_threads(write, 3)
    assert "another rank could not write" in said[0] and "no attribute" in said[1] and said[2] == said[0]
    assert not list(tmp_path.iterdir())


def test_saving_again_replaces_whole(tmp_path):
    for value in (1, 2):
        checkpoint.save(tmp_path / "last", whole({"w": torch.full((2,), value)}), {"step": value})
    assert Checkpoint(tmp_path / "last").state == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint at"):
        Checkpoint(tmp_path / "none")
    directory = tmp_path / "step-1"
    checkpoint.save(directory, whole({"w": torch.ones(2, 3)}), {})
    piece, pieces, index = (directory / name for name in ("rank-00000.safetensors", "rank-00000.json", "index.json"))
    bits = piece.read_bytes()
    piece.write_bytes(bits[:-3])
    with pytest.raises(UserError, match="rank-00000.safetensors cannot be read"):
        Checkpoint(directory).tensor("w")
    piece.write_bytes(bits)
    listed = json.loads(pieces.read_text())
    pieces.write_text(json.dumps([{**listed[0], "shape": [3, 3]}]))
    with pytest.raises(UserError, match="lacks elements 6 to 9 of w"):
        Checkpoint(directory).tensor("w")
    pieces.unlink()
    with pytest.raises(UserError, match="rank-00000.json is missing"):
        Checkpoint(directory)
    index.write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99"):
        Checkpoint(directory)
    index.write_text('{"format"')
    with pytest.raises(UserError, match="not a checkpoint's"):
        Checkpoint(directory)
