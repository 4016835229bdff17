"""Laws of what is made of a checkpoint: the run's masters, whole, under all names, whoever wrote it and loads it."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from safetensors.torch import load_file
from test_deepspeed_engine import fill, made, on_ranks, rows
from torch import nn

from minispeed import checkpoint
from minispeed.axes import Layout
from minispeed.checkpoint import INDEX
from minispeed.collective.threads import run_threads
from minispeed.deepspeed import fragments
from minispeed.deepspeed.fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    convert_zero_checkpoint_to_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
    main,
)
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.precision import Precision

ROOT = Path(__file__).parents[1]
HALVES = {torch.bfloat16: {"bf16": {"enabled": True}}, torch.float16: {"fp16": {"enabled": True}}}
DTYPES = (torch.float64, torch.float32, *HALVES)


class Net(nn.Module):
    """Returns its loss; holds buffers and a parameter of nothing; `tied`: a weight and a module have two names each."""

    def __init__(self, *, tied: bool = True, frozen: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.norm.register_buffer("shift", torch.full((4,), 0.3))
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.empty = nn.Parameter(torch.empty(0, 3))
        if tied:
            self.last.weight, self.again = self.first.weight, self.norm
        fill(self, seed)
        self.inner.requires_grad_(not frozen)

    def forward(self, x):
        hidden = torch.tanh(self.inner(self.norm(self.first(x)) + self.norm.shift))
        return ((self.last(hidden) - x) ** 2).mean() * self.seen


def saved(folder, model, rank=0, ranks=1, stage=1, dtype=torch.float32, **how):
    """Train for a step, save, and return the engine."""
    model.to(dtype if dtype not in HALVES else torch.float32)
    adam = {"type": "AdamW", "params": {"lr": 0.01}}
    engine = made(stage, model=model, optimizer=adam, **HALVES.get(dtype, {}))
    engine.backward(engine(rows(ranks, 1, 0)[0, rank].to(dtype)))
    engine.step()
    engine.save_checkpoint(folder, **how)
    return engine


def equal(found, expected):
    """Whether two states have the same names, dtypes and bits."""
    dtypes = all(x.dtype == expected[name].dtype or not x.numel() for name, x in found.items())
    return found.keys() == expected.keys() and dtypes and all(torch.equal(x, expected[n]) for n, x in found.items())


# ---- the state


@given(
    ranks=st.integers(1, 3),
    stage=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    tied=st.booleans(),
    frozen=st.booleans(),
    left_out=st.sampled_from(["", "when saved", "when read"]),
    lazily=st.booleans(),
)
@example(ranks=2, stage=3, dtype=torch.bfloat16, tied=True, frozen=True, left_out="when read", lazily=True)
@example(ranks=3, stage=1, dtype=torch.float64, tied=True, frozen=True, left_out="when saved", lazily=False)
@settings(max_examples=10)
def test_the_state_is_the_masters_whole_under_every_name(ranks, stage, dtype, tied, frozen, left_out, lazily):
    """Bit for bit; a plain model takes it strictly, and then has the engine's losses, in any dtype."""
    x = rows(1, 1, 9)[0, 0].to(dtype)

    def write(rank):
        model = Net(tied=tied, frozen=frozen)
        how = {"exclude_frozen_parameters": left_out == "when saved"}
        engine = saved(folder, model, rank, ranks, stage, dtype, **how)
        here = dict(model.named_parameters(remove_duplicate=False))
        state = {name: value.detach().clone() for name, value in engine.module_state_dict().items()}
        is_held = {name: p.requires_grad and p.numel() > 0 for name, p in here.items()}
        masters = {name: fragments.safe_get_full_fp32_param(here[name]) for name in here if is_held[name]}
        return state | masters, {name for name, p in here.items() if not p.requires_grad}, engine(x).item()

    with tempfile.TemporaryDirectory() as folder:
        masters, untrained, loss = on_ranks(ranks, write)[0]
        found = get_fp32_state_dict_from_zero_checkpoint(folder, None, left_out == "when read", lazy_mode=lazily)
        if lazily:
            promised = {name: (x.shape, x.dtype) for name, x in found.items()}
            found = {name: x.contiguous() for name, x in found.items()}
            assert promised == {name: (x.shape, x.dtype) for name, x in found.items()}
    lacking = untrained if left_out else set()
    wide = torch.promote_types(dtype, torch.float32)
    expected = {name: x.to(wide) if x.is_floating_point() else x for name, x in masters.items() if name not in lacking}
    assert equal(found, expected)
    plain = Net(tied=tied, frozen=frozen).to(dtype)
    assert {*plain.load_state_dict(found, strict=not lacking).missing_keys} == lacking
    assert plain(x).item() == loss


def test_names_of_one_tensor_have_one(tmp_path):
    saved(tmp_path, Net())
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert found["last.weight"] is found["first.weight"] and found["again.shift"] is found["norm.shift"]
    assert found["last.bias"] is not found["first.bias"] and "passing" not in found


LAYOUTS = {2: [Layout(), Layout(pp=2), Layout(tp=2)], 4: [Layout(pp=2, tp=2)]}


@pytest.mark.parametrize(("ranks", "layout"), [(n, layout) for n in LAYOUTS for layout in LAYOUTS[n]])
@pytest.mark.parametrize("tied", [True, False])
def test_a_run_of_sft_whatever_its_layout(tmp_path, capsys, ranks, layout, tied):
    """From the run's directory, its checkpoints, or one of them."""
    config = GPTConfig(
        vocab_size=8,
        max_positions=8,
        num_layers=2,
        model_dim=8,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        hidden_dim=6,
        tied=tied,
    )

    def write(group):
        engine = Engine(GPT(config), group, precision=Precision(torch.float32), layout=layout, zero=1)
        checkpoint.save(folder / "step-00000007", engine.pieces(), {"step": 7}, group)

    folder, names = tmp_path / "checkpoints", [None, "step-00000007", "best"]
    folder.mkdir()
    for pointer in ("last", "best"):
        (folder / pointer).write_text("step-00000007\n")
    run_threads(write, ranks)
    expected = {name: p.detach() for name, p in GPT(config).named_parameters()}
    for where, tags in ((tmp_path, names), (folder, names), (folder / "step-00000007", [None])):
        for tag in tags:
            assert equal(get_fp32_state_dict_from_zero_checkpoint(where, tag), expected)
    model = load_state_dict_from_zero_checkpoint(GPT(config, seed=1), tmp_path)
    assert equal(model.state_dict(), GPT(config).state_dict()) and "warning" not in capsys.readouterr().out
    with pytest.raises(UserError, match="does not say which parameters were frozen"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path, exclude_frozen_parameters=True)


# ---- a model of the caller's


def test_a_model_is_loaded_and_what_differs_is_said(tmp_path, capsys):
    engine = saved(tmp_path, Net())
    model = load_state_dict_from_zero_checkpoint(Net(seed=1), tmp_path, tag="global_step1")
    assert "warning" not in capsys.readouterr().out
    assert equal(model.state_dict(), {n: x.detach() for n, x in engine.module_state_dict().items()})
    other = Net(seed=1)
    del other.inner
    other.added = nn.Linear(1, 1)
    load_state_dict_from_zero_checkpoint(other, tmp_path)
    printed = capsys.readouterr().out
    assert "warning: the checkpoint has no added.weight, added.bias\n" in printed
    assert "warning: the model has no inner.weight, inner.bias\n" in printed
    with pytest.raises(UserError, match="no tensor of .* has a name of the model's: again.bias there, 0.bias here"):
        load_state_dict_from_zero_checkpoint(nn.Sequential(nn.Linear(1, 1)), tmp_path)
    with pytest.raises(UserError, match=r"an engine's.*engine.destroy\(\)"):
        load_state_dict_from_zero_checkpoint(engine.module, tmp_path)
    engine.destroy()
    load_state_dict_from_zero_checkpoint(engine.module, tmp_path)


# ---- files


def read(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("is_safe", [True, False])
@given(limit=st.integers(1, 400))
@example(limit=100)
@settings(max_examples=3)
def test_files_hold_the_state_and_no_more_than_they_may(tied, is_safe, limit):
    """One file, or several and an index; a larger tensor is alone in one, names of a tensor are in the same."""
    with tempfile.TemporaryDirectory() as folder:
        saved(folder, Net(tied=tied))
        expected = get_fp32_state_dict_from_zero_checkpoint(folder)
        out = Path(folder) / "out"
        convert_zero_checkpoint_to_fp32_state_dict(folder, out, limit, is_safe)
        stem, suffix = ("model", ".safetensors") if is_safe else ("pytorch_model", ".bin")
        files = {path.name: read(path) for path in sorted(out.glob(f"*{suffix}"))}
        indices = [json.loads(path.read_text()) for path in out.glob("*.json")]
    found = {name: x for state in files.values() for name, x in state.items()}
    assert equal(found, expected) and sum(map(len, files.values())) == len(expected)
    held = {}
    for file, state in files.items():
        each = [x.nbytes for x in (state.values() if is_safe else {x.data_ptr(): x for x in state.values()}.values())]
        held[file] = sum(each)
        assert held[file] <= limit or sum(size > 0 for size in each) == (2 if tied and is_safe else 1) or len(each) == 1
    if len(files) == 1:
        assert [*files] == [f"{stem}{suffix}"] and not indices
        return
    assert [*files] == [f"{stem}-{n:05d}-of-{len(files):05d}{suffix}" for n in range(1, len(files) + 1)]
    assert indices == [
        {
            "metadata": {"total_size": sum(held.values())},
            "weight_map": {name: file for file, state in files.items() for name in state},
        }
    ]


def test_a_path_that_is_a_file_is_one(tmp_path):
    saved(tmp_path, Net())
    expected = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    for name in ("a.bin", "b.pt", "c.safetensors"):
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / name, "0.1KB")
        assert equal(read(tmp_path / name), expected)


@pytest.mark.parametrize("dtype", ["bf16", "torch.float16", torch.float64])
def test_another_dtype(tmp_path, dtype):
    saved(tmp_path, Net())
    convert_zero_checkpoint_to_state_dict(tmp_path, tmp_path / "a.bin", dtype)
    wanted = {"bf16": torch.bfloat16, "torch.float16": torch.float16}.get(dtype, torch.float64)
    state = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert equal(read(tmp_path / "a.bin"), {n: x.to(wanted) if x.is_floating_point() else x for n, x in state.items()})
    with pytest.raises(UserError, match="dtype is int8; try: one of fp32"):
        convert_zero_checkpoint_to_state_dict(tmp_path, tmp_path / "a.bin", "int8")


SIZES = {"2GB": 1, " 1.5 mb": 1, 296: 1, "296": 1, "0.296KB": 1, None: 1, "0.295KB": 2, 295: 2, 100: 4}


@pytest.mark.parametrize(("size", "num_files"), SIZES.items())
def test_sizes(tmp_path, size, num_files):
    saved(tmp_path, Net(tied=False))  # 72 numbers of fp32, and one of int64
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "out", size)
    assert len([*(tmp_path / "out").glob("*.bin")]) == num_files


@pytest.mark.parametrize("size", ["5 giga", "-1GB", "GB", ""])
def test_what_is_no_size(tmp_path, size):
    saved(tmp_path, Net())
    with pytest.raises(UserError, match=f"max_shard_size is '{size}'"):
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "out", size)


# ---- the script


def test_the_script_has_deepspeeds_flags(tmp_path, capsys):
    saved(tmp_path, Net())
    out = tmp_path / "out"
    flags = ["--max_shard_size", "100", "--safe_serialization", "-t", "global_step1", "--exclude_frozen_parameters"]
    assert main([str(tmp_path), str(out), *flags]) == 0
    files = sorted(out.glob("*.safetensors"))
    assert capsys.readouterr().out.splitlines() == [f"written: {f} ({f.stat().st_size:,} bytes)" for f in files]
    state = get_fp32_state_dict_from_zero_checkpoint(tmp_path, exclude_frozen_parameters=True)
    assert equal({name: x for file in files for name, x in load_file(file).items()}, state)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), str(out), "--tag", "none"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"zero_to_fp32: there is no checkpoint none in {tmp_path}")
    with pytest.raises(UserError, match="there is no checkpoint none"):
        main([str(tmp_path), str(out), "--tag", "none", "--debug"])


def test_the_script_is_where_deepspeeds_is(tmp_path):
    saved(tmp_path, Net())
    command = [sys.executable, "-m", "minispeed.utils.zero_to_fp32", tmp_path, tmp_path / "out"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert equal(read(tmp_path / "out" / "pytorch_model.bin"), get_fp32_state_dict_from_zero_checkpoint(tmp_path))


# ---- what is missing or damaged


def test_what_is_not_there_is_named_with_what_is(tmp_path):
    with pytest.raises(UserError, match=rf"there is no {tmp_path}/latest.*the folder that save_checkpoint was given"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    for tag in ("step9", "step10", "step11"):
        saved(tmp_path, Net(), tag=tag)
    (tmp_path / "step11" / INDEX).unlink()
    (tmp_path / "step11" / "rank-00000.json").unlink()
    sentence = rf"no checkpoint step11 in {tmp_path}: {tmp_path}/step11/index.json is missing; "
    with pytest.raises(UserError, match=sentence + 'try: tag="step10", the newest that is whole of step10, step9'):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)  # `latest` names it
    (tmp_path / "latest").unlink()
    with pytest.raises(UserError, match=rf'there is no {tmp_path}/latest.*tag="step10"'):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)


@pytest.mark.parametrize("lazily", [False, True])
def test_what_is_damaged_is_named_with_what_is_whole(tmp_path, lazily):
    for tag in ("step9", "step10", "step11"):
        saved(tmp_path, Net(), tag=tag)
    for tag in ("step10", "step11"):
        file = tmp_path / tag / "rank-00000.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{tmp_path}/step11/rank-00000.safetensors.*try: {tmp_path}/step9"):
        found = get_fp32_state_dict_from_zero_checkpoint(tmp_path, lazy_mode=lazily)
        for tensor in found.values():
            tensor.contiguous()
    for tag in ("step9", "step10"):
        (tmp_path / tag / "rank-00000.safetensors").unlink()
    with pytest.raises(UserError, match="another folder: of step10, step11, step9 none is whole"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path, "step12")
