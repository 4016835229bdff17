"""Laws of the checkpoint: what goes in comes out, whoever wrote it, and nothing is ever half-written."""

import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from minispeed import checkpoint
from minispeed.axes import Layout
from minispeed.chat import checkpoints as checkpoints_command
from minispeed.chat.run import RunDirectory
from minispeed.checkpoint import Checkpoint, Piece, Saver, listed, newest_whole, problems, tensors, write
from minispeed.collective.group import SoloGroup
from minispeed.collective.numbers import barrier
from minispeed.collective.threads import run_threads
from minispeed.engine import Engine, MicroBatch
from minispeed.errors import UserError
from minispeed.layout import FlatLayout, Interval
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.placement import WHOLE, Replicated, Shard, Slice
from minispeed.precision import Precision

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


@pytest.mark.parametrize("waits", [True, False])
def test_a_users_own_files_stay_where_a_checkpoint_is_written_again(tmp_path, waits):
    directory, saver = tmp_path / "best", Saver()
    for value in (1, 2, 3):
        if waits:
            checkpoint.save(directory, whole({"w": torch.full((2,), value)}), {"step": value})
        else:
            saver.save(directory, whole({"w": torch.full((2,), value)}), {"step": value})
            saver.wait()
        (directory / "notes.txt").write_text("mine" if value == 1 else (directory / "notes.txt").read_text() + "!")
        (directory / "tokenizer" / "deep").mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer" / "deep" / "a.json").write_text("{}")
        (directory / "rank-00001.json").write_text("[]")  # of a run of more ranks
    checkpoint.save(directory, whole({"w": torch.zeros(2)}), {"step": 4})
    assert (directory / "notes.txt").read_text() == "mine!!" and Checkpoint(directory).state == {"step": 4}
    own = ["index.json", "rank-00000.json", "rank-00000.safetensors"]
    assert sorted(path.name for path in directory.iterdir()) == sorted([*own, "notes.txt", "tokenizer"])
    assert (directory / "tokenizer" / "deep" / "a.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


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
    with pytest.raises(UserError, match="lacks elements 6 to 9 of w"):
        Checkpoint(old(tmp_path / "old", 2, {"w": torch.ones(2, 3)}, shape=[3, 3])).tensor("w")
    pieces.unlink()
    with pytest.raises(UserError, match="rank-00000.json is missing"):
        Checkpoint(directory)
    index.write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99"):
        Checkpoint(directory)
    index.write_text('{"format"')
    with pytest.raises(UserError, match="not a checkpoint's"):
        Checkpoint(directory)


# ---- checksums


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    """Write with blocks so small that a drawn tensor has several, and do not wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (tensors, listed):
            patch.setattr(module, "BLOCK", size)
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def write_shards(directory: Path, drawn: dict[str, torch.Tensor], ranks: int, state: dict | None = None) -> None:
    """Write as many ranks do that hold equal shares of one flat buffer a dtype."""

    def write(group) -> None:
        pieces = []
        for dtype in {x.dtype for x in drawn.values()}:
            mine = {name: x for name, x in drawn.items() if x.dtype == dtype}
            layout = FlatLayout.of(mine, ranks)
            shard = layout.shard(layout.flatten(mine, out=torch.empty(layout.size, dtype=dtype)), group.rank)
            of_rank = layout.pieces(group.rank)
            pieces += [Piece(n, tuple(mine[n].shape), e, shard[slice(*place)]) for n, e, place in of_rank]
        checkpoint.save(directory, pieces, state or {}, group)

    run_threads(write, ranks)


@st.composite
def checkpoints(draw) -> tuple[dict[str, torch.Tensor], int, int]:
    """Draw tensors, how many ranks write them, and in blocks of how many bytes."""
    sizes = draw(st.dictionaries(st.text("ab/", min_size=1, max_size=3), st.integers(1, 60), min_size=1, max_size=4))
    dtype = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    found = {name: torch.randn(size, generator=generator).to(draw(dtype)) for name, size in sizes.items()}
    return found, draw(st.integers(1, 3)), draw(st.sampled_from([16, 64, 1 << 20]))


def check_reading(directory: Path, expected: dict[str, torch.Tensor], state: dict) -> None:
    """What is read is what was written, or a UserError says why not; a damaged file is never taken for a good one."""
    try:
        stored = Checkpoint(directory)
        assert stored.state == state
        assert all(torch.equal(stored.tensor(name), x) for name, x in expected.items())
    except UserError as error:
        assert str(directory) in error.what and error.fix


CHANGES = 20  # of one drawn checkpoint


@given(checkpoints(), st.integers(0, 2**31).map(Random))
def test_every_changed_byte_is_found(tmp_path_factory, drawn, random):
    folder, (expected, ranks, block), state = tmp_path_factory.mktemp("run"), drawn, {"step": 1, "loss": 0.25}
    directory = folder / "step-1"
    with blocks_of(block):
        write_shards(directory, expected, ranks, state)
    assert problems(directory) == []
    files = sorted(directory.iterdir())
    for _ in range(CHANGES):
        path = random.choice(files)
        before = path.read_bytes()
        where = random.randrange(len(before))
        path.write_bytes(before[:where] + bytes([before[where] ^ random.randrange(1, 256)]) + before[where + 1 :])
        said = problems(directory)
        assert said and all(str(directory) in sentence for sentence in said), (path.name, where)
        check_reading(directory, expected, state)
        path.write_bytes(before)
    assert problems(directory) == []


@given(checkpoints(), st.integers(0, 2**31).map(Random))
@settings(max_examples=12)
def test_files_cut_short_grown_swapped_lost_or_added_are_found(tmp_path_factory, drawn, random):
    folder, (expected, ranks, block) = tmp_path_factory.mktemp("run"), drawn
    directory, other = folder / "step-1", folder / "step-2"
    with blocks_of(block):
        write_shards(directory, expected, ranks, {"step": 1})
        write_shards(other, {name: x + 1 for name, x in expected.items()}, ranks, {"step": 2})
    for path in sorted(directory.iterdir()):
        before, others = path.read_bytes(), (other / path.name).read_bytes()
        for after in (before[: random.randrange(len(before))], before + b"\0", others, None):
            if after == before:
                continue
            path.unlink() if after is None else path.write_bytes(after)
            assert problems(directory), path.name
            check_reading(directory, expected, {"step": 1})
            if after is None or len(after) != len(before):
                with pytest.raises(UserError, match=path.name):
                    Checkpoint(directory)
            with pytest.raises(UserError, match="step-2, the newest beside it that is whole"):
                read_all(directory)
            path.write_bytes(before)
    (directory / "more").touch()
    assert [sentence for sentence in problems(directory) if "more is no part" in sentence]


def read_all(directory: Path) -> None:
    stored = Checkpoint(directory)
    for name in stored.shapes:
        stored.tensor(name)


@given(checkpoints(), st.integers(1, 8), st.integers(0, 7))
def test_a_share_is_read_from_about_as_many_bytes(tmp_path_factory, drawn, readers, reader):
    expected, ranks, block = drawn
    directory = tmp_path_factory.mktemp("run") / "step-1"
    with blocks_of(block):
        write_shards(directory, expected, ranks)
    stored = Checkpoint(directory)
    for rank in range(ranks):
        stored._file(rank)  # headers
    for name, x in expected.items():
        for _, elements, _ in FlatLayout.of({name: x}, readers).pieces(reader % readers):
            with counted() as read:
                assert torch.equal(stored.read(name, elements), x[slice(*elements)])
            held = [piece.elements for one in stored._lists for piece in one if piece.name == name]
            touched = sum(1 for there in held if there.meet(elements).size)
            wanted = elements.size * x.dtype.itemsize
            assert wanted <= sum(read) <= min(wanted + 2 * touched * block, x.numel() * x.dtype.itemsize)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Note how many bytes each reading inside this reads."""
    read, real = [], tensors.read_into

    def noted(path, start, out) -> int:
        read.append(len(out))
        return real(path, start, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "read_into", noted)
        yield read


def test_one_of_eight_slices_costs_an_eighth(tmp_path):
    x = torch.arange(1 << 20, dtype=torch.int32)  # 4 MiB
    with blocks_of(1 << 16):
        checkpoint.save(tmp_path / "step-1", whole({"w": x}), {})
    eighth = Interval(3 << 17, 4 << 17)
    with counted() as read:
        assert torch.equal(Checkpoint(tmp_path / "step-1").read("w", eighth), x[slice(*eighth)])
    assert sum(read) - x.nbytes // 8 < 8192  # index, list and header


@st.composite
def cuts(draw, shape: tuple[int, ...]) -> Slice:
    """Draw one slice of a tensor of that shape; of some with chunks, of some with padding."""
    dim, count = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 4))
    first = draw(st.integers(1, shape[dim] - 1)) if shape[dim] > 1 and draw(st.booleans()) else 0
    chunks = (first, shape[dim] - first) if first else (shape[dim],)
    place = draw(st.sampled_from([Replicated(), Shard("tp", dim, chunks, padded=True)]))
    return Slice(place, draw(st.integers(0, count - 1)), count) if isinstance(place, Shard) else WHOLE


@st.composite
def recuts(draw) -> tuple[torch.Tensor, Slice, int, Slice, Interval]:
    """Draw a tensor, a cut that it is stored in, in so many pieces a slice, and elements of a slice of another cut."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + 1
    stored, wanted = draw(cuts(shape)), draw(cuts(shape))
    first, last = sorted(draw(st.integers(0, wanted.of(x).numel())) for _ in range(2))
    return x, stored, draw(st.integers(1, 3)), wanted, Interval(first, last)


def write_cut(directory: Path, x: torch.Tensor, stored: Slice, num_pieces: int = 1) -> None:
    """Write every slice of a cut, each in several pieces."""
    pieces = []
    for part in (replace(stored, index=index) for index in range(stored.count)):
        local = part.of(x).contiguous()
        layout = FlatLayout.of({"w": local}, num_pieces)
        of_ranks = [one for rank in range(num_pieces) for one in layout.pieces(rank)]
        pieces += [Piece("w", tuple(x.shape), e, local.flatten()[slice(*e)].clone(), part=part) for _, e, _ in of_ranks]

    def write(group) -> None:
        checkpoint.save(directory, pieces[group.rank :: group.size], {}, group)

    run_threads(write, len(pieces))


@given(recuts(), st.sampled_from([8, 16, 1 << 20]))
def test_a_slice_of_any_cut_is_read_from_any_other(tmp_path_factory, drawn, block):
    x, stored, num_pieces, wanted, elements = drawn
    directory = tmp_path_factory.mktemp("run") / "step-1"
    with blocks_of(block):
        write_cut(directory, x, stored, num_pieces)
    opened, expected = Checkpoint(directory), wanted.of(x).flatten()
    assert torch.equal(opened.tensor("w"), x)
    assert torch.equal(opened.read("w", elements, wanted), expected[slice(*elements)])
    into = [torch.full((elements.size,), -1.0, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    opened.fill(Piece("w", tuple(x.shape), elements, out, part=wanted) for out in into)
    assert all(out.tolist() == expected[slice(*elements)].tolist() for out in into)


@pytest.mark.parametrize(
    ("shape", "dim", "chunks", "share", "runs"),
    [
        ((4096, 16), 0, (), 1, 1),  # neighbouring rows
        ((4096, 16), 0, (2048, 1024, 1024), 1, 3),  # those of query, key and value
        ((8, 8192), 1, (), 1, 8),  # long rows: of each its part
        ((64, 1024), 1, (), 1, 64),  # rows of four blocks, of which one holds it
        ((4, 64, 256), 1, (), 1, 4),
        ((4096, 16), 1, (), 8, 16),  # short rows: what lies between is in the same blocks, of which 16 are read at once
    ],
)
@pytest.mark.parametrize("num_pieces", [1, 3])
def test_a_slice_of_what_was_stored_whole_is_read_from_about_its_own_bytes(
    tmp_path, shape, dim, chunks, share, runs, num_pieces
):
    x, block, wanted = torch.randn(shape), 1 << 10, Slice(Shard("tp", dim, chunks), 3, 8)
    with blocks_of(block):
        write_cut(tmp_path / "step-1", x, WHOLE, num_pieces)
    opened, part = Checkpoint(tmp_path / "step-1"), wanted.of(x)
    opened.tensor("w")
    with counted() as read:
        assert torch.equal(opened.read("w", Interval(0, part.numel()), wanted), part.flatten())
    assert share * part.nbytes - 2 * block <= sum(read) <= share * part.nbytes + 2 * block * (runs + num_pieces)
    with counted() as read:  # and a flat share of it, of the rows that hold it
        half = Interval(0, part.numel() // 2)
        assert torch.equal(opened.read("w", half, wanted), part.flatten()[slice(*half)])
    assert sum(read) <= share * part.nbytes // 2 + 2 * block * (runs + num_pieces)


def test_blocks_are_summed_in_parts(tmp_path):
    x = torch.arange(600_000.0)  # two blocks and a part, each read in several parts
    write_cut(tmp_path / "step-1", x, WHOLE)
    assert x.nbytes > 2 * tensors.BLOCK > 4 * tensors.CACHED and problems(tmp_path / "step-1") == []
    assert torch.equal(Checkpoint(tmp_path / "step-1").tensor("w"), x)


def test_what_is_filled_in_is_compared(tmp_path):
    directory = tmp_path / "step-1"
    x, out = torch.arange(1000.0), torch.zeros(1000)
    with blocks_of(256):
        write_cut(directory, x, WHOLE)
    path = directory / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"of {path}, of w.*have the CRC-32"):
        Checkpoint(directory).fill([Piece("w", (1000,), Interval(0, 1000), out)])


def test_what_is_damaged_is_named_with_what_was_noted(tmp_path):
    directory = tmp_path / "step-1"
    write_shards(directory, {"parameters/w": torch.arange(6.0)}, 1)
    path = directory / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (said,) = problems(directory)
    noted = json.loads((directory / "rank-00000.json").read_text())[0]["crc32"][0]
    found = zlib.crc32(content[-24:])
    assert said.endswith(f"of {path}, of parameters/w[0:6], have the CRC-32 {found}, {noted} is noted")
    with pytest.raises(UserError, match="another run's: none beside it is whole"):
        Checkpoint(directory).tensor("parameters/w")


def test_what_no_crc_tells_apart_the_whole_tensor_s_checksum_does(tmp_path, monkeypatch):
    monkeypatch.setattr(zlib, "crc32", lambda content, so_far=0: 0)
    directory = tmp_path / "step-1"
    write_shards(directory, {"w": torch.arange(6.0)}, 1)
    path = directory / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    (said,) = problems(directory)
    assert "w[0:6] in" in said and "has the checksum" in said


def test_any_reader_of_the_format_opens_the_tensors(tmp_path):
    drawn = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(4.0, dtype=torch.float64)}
    write_shards(tmp_path / "step-1", drawn, 1)
    found = load_file(tmp_path / "step-1" / "rank-00000.safetensors")
    assert {key: x.tolist() for key, x in found.items()} == {"a[0:3]": [1, 1, 1], "b[0:4]": [0, 1, 2, 3]}


@pytest.mark.parametrize("format", [1, 2])
def test_earlier_formats_are_read(tmp_path, format):
    directory = old(tmp_path / "step-1", format, {"w": torch.arange(6.0)})
    assert Checkpoint(directory).tensor("w").tolist() == list(range(6)) and problems(directory) == []
    (directory / "rank-00000.safetensors").write_bytes(b"\0" * 9)
    assert "cannot be read" in problems(directory)[0]


def old(directory: Path, format: int, drawn: dict[str, torch.Tensor], **changes: object) -> Path:
    """Write as formats without checksums were."""
    directory.mkdir()
    save_file(drawn, directory / "rank-00000.safetensors")
    index = {"format": format, "ranks": 1, "state": {}}
    listed = [{"name": n, "shape": list(x.shape), "elements": [0, x.numel()], "key": n} for n, x in drawn.items()]
    (directory / "rank-00000.json").write_text(json.dumps([{**one, **changes} for one in listed]))
    (directory / "index.json").write_text(json.dumps(index))
    return directory


# ---- a crash at any moment


class Killed(BaseException):
    """What a process that was killed raises from then on: nothing works any more, not even cleaning up."""


CALLS = ("open", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "close", "scandir")


@contextmanager
def killed_at(call: int) -> Iterator[list[str]]:
    """Raise in the call-th call of the operating system that writing makes, and in all after it."""
    made: list[str] = []

    def guarded(name, real):
        def called(*args, **kwargs):
            made.append(name)
            if len(made) >= call:
                raise Killed
            return real(*args, **kwargs)

        return called

    with pytest.MonkeyPatch.context() as patch:
        for module, names in ((os, CALLS), (io, ("open",))):
            for name in names:
                patch.setattr(module, name, guarded(name, getattr(module, name)))
        yield made


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, again, waits):
    """Either the one before or the new one, and then a save succeeds; `again`: where the crash found an older one."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the order of calls is what matters here
    run, saved, call = RunDirectory(tmp_path / "run"), False, 0
    first, second = (whole({"w": torch.full((9,), float(value))}) for value in (1, 2))
    while not saved:
        call += 1
        checkpoint.remove(run.path)
        run.save_checkpoint(first, {"step": 1}, SoloGroup(), best=False)
        step = 1 if again else 2
        try:
            with killed_at(call) as made:
                run.save_checkpoint(second, {"step": step, "new": True}, SoloGroup(), best=False, wait=waits)
                run.wait()
            saved = True
        except Killed:
            assert len(made) >= call
        run = RunDirectory(run.path)
        stored = run.load_checkpoint()
        assert stored.verify() == [], call
        assert all(problems(path) == [] for path in stored.directory.parent.glob("step-*"))
        assert stored.tensor("w").tolist() == [2.0 if stored.state.get("new") else 1.0] * 9
        run.save_checkpoint(second, {"step": 3}, SoloGroup(), best=False)
        assert run.load_checkpoint().state == {"step": 3}
    assert call > 20 and stored.state.get("new")


def test_all_is_on_the_disk_before_it_is_moved_and_the_move_after(tmp_path, monkeypatch):
    synced, moves = [], []
    sync, rename = os.fsync, os.rename

    def noted(handle) -> None:
        synced.append(os.fstat(handle).st_ino)
        sync(handle)

    def checked(source, target) -> None:
        missing = {path.name for path in (source, *source.iterdir()) if path.stat().st_ino not in synced}
        moves.append((target.name, missing))
        synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted), monkeypatch.setattr(os, "rename", checked)
    write_shards(tmp_path / "step-1", {"w": torch.ones(3)}, 3)
    assert moves == [("step-1", set())] and tmp_path.stat().st_ino in synced


def test_what_a_crash_left_is_read_only_where_nothing_else_stands(tmp_path):
    for name in ("step-1", "step-2", ".step-3.writing", ".step-4.removing"):
        write_shards(tmp_path / name, {"w": torch.ones(3)}, 1)
    assert [path.name for path in checkpoint.checkpoints_in(tmp_path)] == ["step-1", "step-2"]
    assert newest_whole(tmp_path).name == "step-2"
    (tmp_path / "step-2").rename(tmp_path / ".step-2.old")
    assert (
        newest_whole(tmp_path).name == "step-2" and newest_whole(tmp_path, besides=tmp_path / "step-2").name == "step-1"
    )
    assert Checkpoint(tmp_path / "step-2").tensor("w").tolist() == [1, 1, 1]
    write_shards(tmp_path / "step-2", {"w": torch.zeros(3)}, 1)
    assert Checkpoint(tmp_path / "step-2").tensor("w").tolist() == [0, 0, 0] and not (tmp_path / ".step-2.old").exists()


def test_what_a_crash_left_goes_with_the_next_save_there(tmp_path):
    left = tmp_path / ".step-1.writing"
    left.mkdir()
    (left / "rank-00007.json").write_text("half")
    write_shards(tmp_path / "step-1", {"w": torch.ones(3)}, 2)
    assert problems(tmp_path / "step-1") == [] and [path.name for path in tmp_path.iterdir()] == ["step-1"]


# ---- which are kept


@given(st.sets(st.integers(0, 40)), st.integers(0, 5), st.integers(0, 7), st.data())
def test_what_is_kept(steps, last, every, data):
    named = data.draw(st.sets(st.sampled_from(sorted(steps)))) if steps else set()
    gone = checkpoint.to_delete(steps, last=last, every=every, named=named)
    kept = steps - set(gone)
    assert gone == sorted(set(gone)) and set(gone) <= steps
    for step in steps:
        newer = sum(other > step for other in steps)
        assert (step in kept) == (newer < last or step in named or (every > 0 and step % every == 0))
    assert checkpoint.to_delete(kept, last=last, every=every, named=named) == []


def test_a_run_keeps_what_it_is_told_to(tmp_path):
    run, folder = RunDirectory(tmp_path), tmp_path / "checkpoints"

    def save(step, best=False, **kept) -> list[int]:
        run.save_checkpoint(whole({"w": torch.ones(1)}), {"step": step}, SoloGroup(), best=best, **kept)
        assert run.load_checkpoint().state["step"] == step
        return sorted(int(path.name[5:]) for path in folder.glob("step-*"))

    assert [save(1), save(2, best=True), save(3), save(4)] == [[1], [2], [2, 3], [2, 4]]
    assert [save(step, last=2, every=3) for step in (5, 6, 7, 8)] == [[2, 4, 5], [2, 5, 6], [2, 6, 7], [2, 6, 7, 8]]
    assert save(7, last=2, every=3) == [2, 6, 7]  # what came after is of a future that is no more
    with pytest.raises(UserError, match="last -1 would be kept"):
        save(8, last=-1)


# ---- in the background


def pieces_at(group, value: float) -> list[Piece]:
    shared = torch.full((2,), value, dtype=torch.float64)
    mine = torch.full((4, 2), value).T  # not in one piece
    return [
        Piece("shared", (2,), Interval(0, 2), shared, is_copy=group.rank > 0),
        Piece("cut", (8 * group.size,), Interval(8 * group.rank, 8 * group.rank + 8), mine),
    ]


@given(st.integers(1, 3), st.lists(st.integers(-9, 9), min_size=1, max_size=3))
@settings(max_examples=15)
def test_a_save_in_the_background_is_the_save_that_waits(tmp_path_factory, ranks, values):
    folder = tmp_path_factory.mktemp("run")

    def train(group) -> None:
        saver = Saver(group)
        for step, value in enumerate(values):
            pieces, state = pieces_at(group, value), {"step": step, "seen": [value]}
            checkpoint.save(folder / f"waited-{step}", pieces, state, group)
            saver.save(folder / f"step-{step}", pieces, state)
            state["seen"].append("later")
            for piece in pieces:
                piece.tensor.fill_(77)
        saver.wait()
        saver.wait()

    run_threads(train, ranks)
    for step in range(len(values)):
        for path in (folder / f"waited-{step}").iterdir():
            assert path.read_bytes() == (folder / f"step-{step}" / path.name).read_bytes(), path.name
    assert len(list(folder.iterdir())) == 2 * len(values)


def test_the_copies_are_used_again(tmp_path):
    saver, places = Saver(), []
    for step in range(3):
        saver.save(tmp_path / "step", pieces_at(SoloGroup(), step), {})
        places.append([copy.data_ptr() for copy in saver._copies.values()])
    saver.wait()
    assert places[0] == places[1] == places[2]


def test_it_counts_only_once_all_have_waited(tmp_path):
    saver, moved = Saver(), []
    saver.save(tmp_path / "step-1", pieces_at(SoloGroup(), 1), {}, then=lambda: moved.append(1))
    saver._writing.thread.join()
    assert [path.name for path in tmp_path.iterdir()] == [".step-1.writing"] and not moved
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"] and moved == [1]


@pytest.mark.parametrize("waits", [True, False])
def test_a_disk_that_is_full_for_one_rank_is_one_sentence_on_all(tmp_path, monkeypatch, waits):
    real = write.write_tensors
    full = []

    def on_one_disk(path, tensors):
        if full and path.name == "rank-00001.safetensors":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(path, tensors)

    monkeypatch.setattr(write, "write_tensors", on_one_disk)

    def train(group) -> tuple[str, str]:
        run = RunDirectory(tmp_path)
        run.save_checkpoint(pieces_at(group, 1), {"step": 1}, group, best=True, wait=waits)
        run.wait()
        barrier(group)
        full.append(True)
        barrier(group)
        try:
            run.save_checkpoint(pieces_at(group, 2), {"step": 2}, group, best=False, wait=waits)
            run.wait()
        except UserError as error:
            barrier(group)
            full.clear()
            barrier(group)
            run.save_checkpoint(pieces_at(group, 3), {"step": 3}, group, best=False, wait=waits)
            run.wait()
            return error.what, error.fix
        return "", ""

    said = run_threads(train, 3)
    assert set(said) == {said[0]} and re.search("rank 1: could not write .*step-00000002: .*No space left", said[0][0])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best", "last", *steps_at(1, 3)]
    assert all(problems(tmp_path / "checkpoints" / name) == [] for name in steps_at(1, 3))


def steps_at(*steps: int) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


def test_a_state_that_is_no_json_fails_at_the_wait(tmp_path):
    saver = Saver()
    saver.save(tmp_path / "step-1", pieces_at(SoloGroup(), 1), {"step": {1}})
    with pytest.raises(TypeError, match="set"):
        saver.wait()
    assert not list(tmp_path.iterdir())


# ---- the command


@dataclass(frozen=True)
class Asked:
    directory: Path
    tensors: bool = False


def said_of(capsys, directory: Path, **asked: bool) -> tuple[int, str]:
    code = checkpoints_command.checkpoint(Asked(directory, **asked))
    return code, capsys.readouterr().out


def test_the_command_says_what_is_there_and_what_is_damaged(tmp_path, capsys):
    run, folder = RunDirectory(tmp_path), tmp_path / "checkpoints"
    tensors = {"parameters/w": torch.ones(2, 3), "exp_avg/w": torch.ones(2, 3, dtype=torch.float64)}
    for step in (4, 8):
        state = {"step": step, "progress": {"epoch": 1, "best_loss": None}, "scaler": {"scale": 65536.0}}
        run.save_checkpoint(whole(tensors), state, SoloGroup(), best=step == 4)
    for directory in (tmp_path, folder, folder / "step-00000008"):
        code, said = said_of(capsys, directory, tensors=True)
        assert code == 0 and "step-00000008  (last)" in said and ("(best)" in said) == (directory.name[:4] != "step")
        for part in (
            "format 3, 1 rank, 0.0 MB",
            "parameters: 1, 6 numbers, fp32",
            "step 8, epoch 1, loss scale 65,536",
        ):
            assert part in said
        assert "exp_avg/w  [2, 3]  fp64" in said and "\n  whole\n" in said and "best loss" not in said
    path = folder / "step-00000008" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    (folder / ".step-00000012.writing").mkdir()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    code, said = said_of(capsys, tmp_path)
    assert code == 1 and "damaged: bytes" in said and said.count("whole\n") == 1
    assert f"{folder / '.step-00000012.writing'} was left by a writing that did not end (0.0 MB)" in said
    assert f"the newest that is whole: {folder / 'step-00000004'}" in said
    assert said.endswith(f"to go on from it: echo step-00000004 > {folder / 'last'}\n")
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    (folder / "step-00000008" / "index.json").unlink()
    code, said = said_of(capsys, folder / "step-00000008")
    assert code == 1 and "index.json is missing" in said and "the newest that is whole" in said
    checkpoint.remove(folder / "step-00000004")
    code, said = said_of(capsys, tmp_path)
    assert code == 1 and f"no checkpoint in {folder} is whole" in said and "best names step-00000004, which is" in said


def test_the_command_reads_tags_and_earlier_formats(tmp_path, capsys):
    write_shards(tmp_path / "global_step10", {"parameters/w": torch.ones(2)}, 2, {"global_steps": 10})
    old(tmp_path / "global_step9", 2, {"parameters/w": torch.ones(2)})
    (tmp_path / "latest").write_text("global_step10\n")
    code, said = said_of(capsys, tmp_path)
    assert code == 0 and said.index("global_step9") < said.index("global_step10  (latest)")
    assert "format 3, 2 ranks" in said and "steps 10" in said
    assert "format 2, 1 rank" in said and "whole, as far as its format can tell" in said
    with pytest.raises(UserError, match="there is no checkpoint in"):
        said_of(capsys, tmp_path / "elsewhere")


# ---- from any layout to any other

TOKENS, ROWS, MICROS = 8, 8, 2


@dataclass(frozen=True)
class Shared:
    """How ranks share a model: a layout, replicas or ZeRO's shards of it, and the stage."""

    layout: Layout
    dp: int
    stage: int

    @property
    def ranks(self) -> int:
        return self.dp * self.layout.ranks


@st.composite
def shared(draw) -> Shared:
    left, sizes = 4, {}
    for axis in draw(st.permutations(["pp", "sp", "tp", "dp"])):
        sizes[axis] = draw(st.sampled_from([size for size in (2, 1, 4) if size <= left]))
        left //= sizes[axis]
    dp, pp = sizes.pop("dp"), sizes["pp"]
    schedule = draw(st.sampled_from(["1f1b", "gpipe"] + ["interleaved"] * (pp == 2)))
    virtual = 2 if schedule == "interleaved" else 1
    sequence = "ring" if sizes["sp"] * sizes["tp"] > 2 else draw(st.sampled_from(["ring", "ulysses"]))
    return Shared(Layout(**sizes, schedule=schedule, virtual=virtual, sequence=sequence), dp, draw(st.integers(0, 3)))


def engine_of(how: Shared, group, config: GPTConfig, seed: int) -> Engine:
    model = GPT(config, seed=seed).to(torch.float64)
    precision = Precision(torch.float64)
    return Engine(model, group, layout=how.layout, precision=precision, lr=1e-3, zero=how.stage, weight_decay=0.1)


def make_steps(engine: Engine, seeds: range) -> None:
    """Train on this replica's share of the rows that each seed draws, whatever the layout."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        tokens, labels = torch.randint(0, 5, (2, ROWS, TOKENS), generator=generator)
        zeros = torch.zeros_like(tokens)
        dp, positions = engine.lines.dp, torch.arange(TOKENS).expand_as(tokens)
        fields = (tokens, labels, positions, zeros, zeros)
        mine = [x.view(MICROS, dp.size, -1, TOKENS)[:, dp.rank] for x in fields]
        engine.train_step([MicroBatch(*(x[micro] for x in mine)) for micro in range(MICROS)])


@given(shared(), shared(), st.booleans(), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=6)
def test_any_layout_goes_on_exactly_from_any_other(tmp_path_factory, before, after, tied, padded, seed):
    """Every tensor, moment and number is there to the bit; three steps later all still agree."""
    folder = tmp_path_factory.mktemp("run")
    config = preset("nano", num_layers=2, model_dim=4, num_heads=4, num_kv_heads=4, head_dim=2, hidden_dim=4)
    config = replace(config, vocab_size=5 if padded else 8, max_positions=TOKENS, tied=tied)

    def write(group) -> None:
        engine = engine_of(before, group, config, seed)
        make_steps(engine, range(seed, seed + 1))
        checkpoint.save(folder / "written", engine.pieces(), {}, group)
        make_steps(engine, range(seed + 1, seed + 4))
        checkpoint.save(folder / "straight", engine.pieces(), {}, group)

    def read(group) -> None:
        engine = engine_of(after, group, config, seed + 1)
        engine.load(Checkpoint(folder / "written"), step=1, num_updates=1)
        checkpoint.save(folder / "again", engine.pieces(), {}, group)
        make_steps(engine, range(seed + 1, seed + 4))
        checkpoint.save(folder / "resumed", engine.pieces(), {}, group)

    run_threads(write, before.ranks)
    run_threads(read, after.ranks)
    written, straight, again, resumed = (Checkpoint(folder / n) for n in ("written", "straight", "again", "resumed"))
    assert {name.partition("/")[0] for name in written.shapes} == {"parameters", "exp_avg", "exp_avg_sq", "step"}
    assert written.shapes == again.shapes == resumed.shapes
    for name in written.shapes:
        x, y = straight.tensor(name), resumed.tensor(name)
        assert torch.equal(written.tensor(name), again.tensor(name)), name
        assert (x - y).abs().max() <= 1e-10 * max(1.0, x.abs().max().item()), name
