"""Laws of HuggingFace's form: a model computes the same in their library and in ours, whichever way it went.

Theirs computes norms and rotary angles in float32 whatever the model's dtype. So there are two comparisons: in float64
at 1e-10, with that float32 made float64 while their model is built and run (`doubled`), and in float32 at 1e-5, as it
is.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from minispeed.axes import Layout
from minispeed.checkpoint import Checkpoint, save as save_checkpoint
from minispeed.collective.threads import run_threads
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.layout import Interval
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.hf import HFSource, is_hf, load, read_config, resolve, save
from minispeed.model.hf.config import family_for, from_json, to_json
from minispeed.model.hf.families import FAMILIES
from minispeed.model.hf.weights import shapes_of
from minispeed.model.presets import PRESETS, preset
from minispeed.placement import WHOLE, Shard, Slice
from minispeed.precision import Precision

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

SCALINGS = [
    {},
    {"rope_scaling": "linear", "rope_factor": 3.0},
    {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_low": 1.0, "rope_high": 4.0, "rope_original": 64},
]


@st.composite
def configs(draw: st.DrawFn, tp: int = 1) -> GPTConfig:
    """Draw a GPT of a few hundred parameters that one of their architectures can hold, and tp can cut."""
    kind = draw(st.sampled_from(list(FAMILIES)))
    kv = tp * draw(st.integers(1, 2))
    heads, head_dim = kv * (1 if kind == "gpt2" else draw(st.integers(1, 3))), draw(st.sampled_from([2, 4]))
    whole = kind in ("gpt2", "stablelm") or draw(st.booleans())
    dim = heads * head_dim if whole else heads * 3 if kind == "llama" else draw(st.sampled_from([3, 8]))
    biased = {"qkv_bias": kind in ("gpt2", "qwen2") or draw(st.booleans())}
    family: dict[str, Any] = {
        "gpt2": dict(norm="layernorm", positions="learned", mlp="gelu", bias=True),
        "llama": dict(out_bias=biased["qkv_bias"], mlp_bias=draw(st.booleans())),
        "qwen2": {},
        "qwen3": dict(out_bias=biased["qkv_bias"], qk_norm=True),
        "stablelm": dict(norm="layernorm"),
    }[kind]
    turned = draw(st.sampled_from(SCALINGS)) | {"rope_theta": draw(st.sampled_from([100.0, 10000.0, 500000.0]))}
    return GPTConfig(
        vocab_size=draw(st.integers(3, 23)),
        max_positions=draw(st.sampled_from([16, 128])),
        num_layers=draw(st.integers(1, 2)),
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        hidden_dim=tp * draw(st.integers(1, 4)),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        tied=draw(st.booleans()),
        **biased,
        **family,
        **({} if kind == "gpt2" else turned),
    )


def filled(config: GPTConfig, seed: int) -> GPT:
    """A model whose every parameter matters, biases and gains included, in float64."""
    model = GPT(config).to(torch.float64)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.4 + ("norm" in name))
    return model


def named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


@contextmanager
def doubled() -> Iterator[None]:
    """Make float64 of what their models compute in float32 in any case."""
    with (
        mock.patch.multiple(torch, float32=torch.float64, float=torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


@contextmanager
def folders() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def rows(config: GPTConfig, seed: int) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(seed))


def check_alike(folder: Path, ours: GPT, tokens: torch.Tensor) -> None:
    """Compare a folder, read by their library, with a model of ours: both ways of the module's docstring."""
    with torch.no_grad():
        with doubled():
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(tokens).logits
        assert theirs.dtype == torch.float64 and close(ours.logits(tokens), theirs, 1e-10)
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert close(load(folder, dtype=torch.float32).logits(tokens), plain(tokens).logits, 1e-5)


@given(configs(), st.sampled_from([1, 300, 10**9]), st.integers(0, 2**31))
@settings(max_examples=25, print_blob=True)
def test_ours_is_theirs_and_comes_back_bitwise(config, shard_bytes, seed):
    model = filled(config, seed)
    with folders() as folder:
        save(folder / "m", config, named(model), shard_bytes=shard_bytes, extra={"eos_token_id": 1})
        check_alike(folder / "m", model, rows(config, seed))
        assert read_config(folder / "m") == config
        assert same(named(load(folder / "m")), named(model))
        assert (folder / "m" / "model.safetensors").exists() == (shard_bytes == 10**9)
        assert json.loads((folder / "m" / "config.json").read_text())["eos_token_id"] == 1
        assert os.listdir(folder) == ["m"]


@st.composite
def their_configs(draw: st.DrawFn) -> Any:
    """Draw a configuration in their words."""
    kind = draw(st.sampled_from(list(FAMILIES)))
    kv, eps, tied = draw(st.integers(1, 2)), draw(st.sampled_from([1e-6, 1e-2])), draw(st.booleans())
    common = dict(vocab_size=23, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied)
    if kind == "gpt2":
        sizes = dict(n_embd=4 * kv, n_head=kv, n_layer=2, n_positions=16, n_inner=draw(st.sampled_from([None, 5])))
        act = draw(st.sampled_from(["gelu_new", "gelu_pytorch_tanh"]))
        return transformers.GPT2Config(**sizes, layer_norm_epsilon=eps, activation_function=act, **common)
    heads, theta = kv * draw(st.integers(1, 3)), draw(st.sampled_from([100.0, 10000.0]))
    llama3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    scaling = draw(st.sampled_from([dict(rope_type="linear", factor=2.0), dict(rope_type="llama3", **llama3), {}]))
    sizes = dict(hidden_size=4 * heads, num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=7)
    sizes |= dict(num_hidden_layers=2, max_position_embeddings=128)
    rope = {"rope_parameters": {"rope_theta": theta, "rope_type": "default"} | scaling}
    if kind == "stablelm":
        of_its_own = dict(use_qkv_bias=draw(st.booleans()), layer_norm_eps=eps, partial_rotary_factor=1.0)
        return transformers.StableLmConfig(**sizes, **rope, **of_its_own, **common)
    biases = {"attention_bias": draw(st.booleans())} if kind != "qwen2" else {}
    biases |= {"mlp_bias": draw(st.booleans())} if kind == "llama" else {}
    width = draw(st.sampled_from([{}, {"head_dim": 6}]))
    make = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    return make[kind](**sizes, **rope, **biases, **width, **common, rms_norm_eps=eps)


@given(their_configs(), st.sampled_from(["1KB", "1GB"]), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=25, print_blob=True)
def test_theirs_is_ours(config, max_shard_size, is_old, seed):
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with folders() as folder, torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.4)
        theirs.save_pretrained(folder, max_shard_size=max_shard_size)
        if is_old:
            change(folder, as_before_5)
        assert is_hf(folder)
        ours = load(folder, attention="tiled")
        assert ours.config.attention == "tiled" and ours.config == read_config(folder, attention="tiled")
        check_alike(folder, ours, rows(ours.config, seed))


def as_before_5(values: dict[str, Any]) -> None:
    """Say the rotary angles as transformers 4 did."""
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        values.update({key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope})
        values["rope_scaling"] = None if rope["rope_type"] == "default" else rope


def change(folder: Path, by: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    by(values)
    (folder / "config.json").write_text(json.dumps(values))


@st.composite
def parts(draw: st.DrawFn, shape: tuple[int, ...]) -> Slice:
    """Draw a slice of a tensor, as tensor parallelism cuts: any dim, in chunks, padded."""
    dim = draw(st.integers(0, len(shape) - 1))
    count = draw(st.sampled_from([2, 3, 5]))
    first = draw(st.integers(1, shape[dim]))
    chunks = draw(st.sampled_from([(shape[dim],), (first, shape[dim] - first) if first < shape[dim] else (first,)]))
    return draw(
        st.sampled_from([WHOLE, Slice(Shard("tp", dim, chunks, padded=True), draw(st.integers(0, count - 1)), count)])
    )


@given(configs(), st.data(), st.integers(0, 2**31))
@settings(max_examples=15, print_blob=True)
def test_any_slice_is_that_slice_of_the_whole(config, data, seed):
    model = filled(config, seed)
    with folders() as folder:
        save(folder / "m", config, named(model))
        source = HFSource(folder / "m")
        assert source.shapes == {f"parameters/{name}": tuple(p.shape) for name, p in named(model).items()}
        for name, p in named(model).items():
            part = data.draw(parts(tuple(p.shape)))
            expected = part.of(p).flatten()
            a, b = sorted(data.draw(st.tuples(*[st.integers(0, expected.numel())] * 2)))
            found = source.read(f"parameters/{name}", Interval(a, b), part)
            assert found is not None and torch.equal(found.to(torch.float64), expected[a:b]), (name, part, a, b)
        assert source.read("exp_avg/norm.weight", Interval(0, 1)) is None
        assert source.read("parameters/norm.gain", Interval(0, 1)) is None


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int, int, GPTConfig]:
    pp, dp, tp = draw(st.sampled_from([(1, 1, 2), (2, 1, 1), (1, 3, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (2, 2, 2)]))
    return Layout(pp=pp, tp=tp), dp, draw(st.integers(0, 3)), draw(configs(tp=tp))


def engine_of(group: Any, model: GPT, layout: Layout, stage: int) -> Engine:
    return Engine(model, group, layout=layout, precision=Precision(torch.float64), lr=1e-3, zero=stage)


@given(layouts(), st.integers(0, 2**31))
@settings(max_examples=15, print_blob=True)
def test_each_rank_loads_its_slice(drawn, seed):
    layout, dp, stage, config = drawn
    with folders() as folder:
        expected = named(filled(config, seed))
        save(folder / "m", config, expected)

        def run(group: Any) -> None:
            engine = engine_of(group, GPT(config).to(torch.float64), layout, stage)
            engine.load(HFSource(folder / "m"), step=0, num_updates=0, with_optimizer=False)
            save_checkpoint(folder / "c", engine.pieces(), {}, group)

        run_threads(run, dp * layout.ranks)
        held = Checkpoint(folder / "c")
        assert same({name: held.tensor(f"parameters/{name}") for name in expected}, expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("layout, stage, ranks", [({"tp": 8}, 0, 8), ({"pp": 2}, 0, 2), ({}, 3, 4)])
def test_a_rank_reads_what_it_holds(tmp_path, kind, layout, stage, ranks):
    """Over tp, what is not cut is read by all; of a ZeRO shard that ends within a row, the row."""
    sizes = dict(num_layers=2, model_dim=64, num_heads=8, num_kv_heads=8, head_dim=8, hidden_dim=128, tied=False)
    family = preset("gpt2") if kind == "gpt2" else preset("llama-3.2-1b")
    config = replace(family, vocab_size=96, max_positions=4, **sizes)
    weights = named(GPT(config))
    save(tmp_path / "m", config, weights)
    uncut = ("norm.weight", "norm.bias", "out.bias", "down.bias", "positions.weight")
    whole, copied = (
        sum(p.nbytes for p in weights.values()),
        sum(weights[n].nbytes for n in weights if n.endswith(uncut)),
    )

    def run(group: Any) -> int:
        engine = engine_of(group, GPT(config).to(torch.float64), Layout(**layout), stage)
        source = HFSource(tmp_path / "m")
        assert source.bytes_read == 0
        engine.load(source, step=0, num_updates=0, with_optimizer=False)
        return source.bytes_read

    read = run_threads(run, ranks)
    if stage < 3:
        assert sum(read) == whole + (layout.get("tp", 1) - 1) * copied
    assert whole <= sum(read) <= 1.15 * whole
    assert "pp" in layout or max(read) <= 1.15 * whole / ranks  # the stages of a pipeline are of two sizes


def small(folder: Path, kind: str = "llama", **other: Any) -> Path:
    """A folder with a model of the published family."""
    names = {"gpt2": "gpt2", "llama": "llama-3.2-1b", "qwen2": "qwen2.5-0.5b", "stablelm": "tiny"}
    sizes = dict(num_layers=1, model_dim=4, num_heads=2, num_kv_heads=2, head_dim=2, hidden_dim=3)
    config = preset(names.get(kind, "llama-3.2-1b"), vocab_size=5, max_positions=16, **sizes | other)
    config = replace(config, qk_norm=True) if kind == "qwen3" else config
    save(folder / kind, config, named(filled(config, 0)))
    return folder / kind


DEFAULT, LINEAR = {"rope_type": "default", "rope_theta": 1000.0}, {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
REFUSED = {
    "qwen2 use_sliding_window": (True, "use_sliding_window is True; try: False"),
    "qwen3 layer_types": (["full_attention", "sliding_attention"], r"layer_types is .*; try: 'full_attention'"),
    "llama sliding_window": (4096, "sliding_window is 4096; try: None"),
    "llama rope_scaling": (YARN, "rope_type is 'yarn'; try: one of default, linear, llama3"),
    "llama rope_scaling dynamic": ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'"),
    "qwen2 rope_parameters": ({"rope_type": "default", "rope_theta": 5.0}, r"rope_theta is 5.0 and 1000000.0"),
    "qwen3 rope_scaling": ({"type": "linear"}, "rope_type 'linear' lacks factor"),
    "qwen2 rope_scaling": ({"rope_type": "default", "partial_rotary_factor": 0.5}, "has partial_rotary_factor 0.5"),
    "llama rope_parameters": ({"rope_type": "linear", "factor": 2.0}, "rope_scaling is .*, and rope_parameters"),
    "gpt2 rope_theta": (1e4, "rope_theta is 10000.0, and what that does in a gpt2 is not known"),
    "llama hiden_size": (8, "hiden_size is 8, and what that does .*; try: hidden_size"),
    "llama hidden_act": ("gelu", "hidden_act is 'gelu'; try: 'silu'"),
    "gpt2 activation_function": ("relu", "activation_function is 'relu'; try: 'gelu_new' or 'gelu_pytorch_tanh'"),
    "llama attention_dropout": (0.1, "attention_dropout is 0.1; try: 0"),
    "llama pretraining_tp": (2, "pretraining_tp is 2; try: 1"),
    "gpt2 scale_attn_weights": (False, "scale_attn_weights is False; try: True"),
    "gpt2 scale_attn_by_inverse_layer_idx": (True, "scale_attn_by_inverse_layer_idx is True"),
    "llama quantization_config": ({"bits": 4}, "quantization_config is"),
    "llama model_type": (
        "mistral",
        r"model_type 'mistral'.*; try: one of gpt2 .*, llama .*, qwen2 .*, qwen3 .*, stablelm",
    ),
    "llama architectures": (["LlamaForSequenceClassification"], "architectures is .*LlamaForSequenceClassification"),
    "qwen3 rms_norm_eps": (None, "rms_norm_eps is null"),
    "stablelm partial_rotary_factor": (0.25, "partial_rotary_factor is 0.25; try: 1: all features of a head"),
    "stablelm rope_scaling": (LINEAR | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; try: 1"),
    "stablelm rope_parameters": (DEFAULT | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; try: 1"),
    "stablelm use_parallel_residual": (True, "use_parallel_residual is True; try: False"),
    "stablelm qk_layernorm": (True, "qk_layernorm is True; try: False"),
    "stablelm hidden_dropout": (0.1, "hidden_dropout is 0.1; try: 0"),
    "stablelm attention_dropout": (0.1, "attention_dropout is 0.1; try: 0"),
    "stablelm head_dim": (2, "head_dim is 2, and what that does in a stablelm is not known"),
    "stablelm num_key_value_heads": (None, "num_key_value_heads is null"),
}


@pytest.mark.parametrize("of", REFUSED)
def test_a_key_that_may_change_the_model_is_named(tmp_path, of):
    (kind, key, *_), (value, match) = of.split(), REFUSED[of]
    folder = small(tmp_path, kind)
    change(folder, lambda values: values.update({key: value}))
    with pytest.raises(UserError, match=match):
        HFSource(folder)


def test_the_first_key_that_does_not_fit_is_named_with_the_architecture(tmp_path):
    folder = small(tmp_path)
    change(folder, lambda values: values.update(model_type="mistral", architectures=None, sliding_window=4096))
    with pytest.raises(UserError, match="'mistral'.*as llama: sliding_window is 4096"):
        read_config(folder)
    change(folder, lambda values: values.pop("model_type") and values.pop("architectures"))
    assert not is_hf(folder) and not is_hf(tmp_path)


@pytest.mark.parametrize(
    "kind, key, match",
    [
        ("llama", "intermediate_size", "config.json has no intermediate_size"),
        ("stablelm", "partial_rotary_factor", "partial_rotary_factor is 0.25"),
    ],
)
def test_a_key_that_must_be_there_is_named(tmp_path, kind, key, match):
    folder = small(tmp_path, kind)
    change(folder, lambda values: values.pop(key))
    with pytest.raises(UserError, match=match):
        read_config(folder)


@pytest.mark.parametrize("kind, key", [("gpt2", "n_positions"), ("qwen2", "max_position_embeddings")])
def test_rows_longer_than_its_positions_are_refused(tmp_path, kind, key):
    folder = small(tmp_path, kind)
    assert read_config(folder, seq=16).max_positions == 16
    with pytest.raises(UserError, match=f"{key} is 16, and rows of 17 tokens are wanted"):
        load(folder, seq=17)


Q = "model.layers.0.self_attn.q_proj.weight"
TENSORS = {
    f"has no tensor {Q}": lambda held: held.pop(Q),
    f"has a tensor {Q.replace('q_', 'g_')}, which": lambda held: held.update({Q.replace("q_", "g_"): held[Q].clone()}),
    rf"{Q} has the shape \(3, 4\), and config.json says \(4, 4\)": lambda held: held.update({Q: held[Q][:3].clone()}),
    f"{Q} holds numbers of kind I8": lambda held: held.update({Q: held[Q].to(torch.int8)}),
    "lm_head.weight differs from model.embed_tokens.weight": lambda held: held.update(
        {"lm_head.weight": held["model.embed_tokens.weight"] + 1}
    ),
}


@pytest.mark.parametrize("match", TENSORS)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, match):
    folder = small(tmp_path)
    retouch(folder, TENSORS[match])
    with pytest.raises(UserError, match=match):
        HFSource(folder)


def retouch(folder: Path, by: Any) -> None:
    held = load_file(folder / "model.safetensors")
    by(held)
    save_file(held, folder / "model.safetensors")


def test_what_older_files_hold_beside_is_no_matter(tmp_path):
    """A tied head that is equal, masks and frequencies, and names without what precedes them all."""
    for kind, prefix, embedding, extra in [
        ("gpt2", "transformer.", "wte.weight", "h.0.attn.bias"),
        ("llama", "model.", "embed_tokens.weight", "layers.0.self_attn.rotary_emb.inv_freq"),
    ]:
        folder = small(tmp_path, kind)
        expected = named(load(folder))

        def older(held: dict[str, torch.Tensor]) -> None:
            bare = {name.removeprefix(prefix): tensor for name, tensor in held.items()}
            held.clear()
            held.update(bare, **{extra: torch.ones(2), "lm_head.weight": bare[embedding].clone()})

        retouch(folder, older)
        assert same(named(load(folder)), expected)


def test_files_that_are_not_there_or_damaged_are_named(tmp_path):
    folder = small(tmp_path)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        HFSource(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(UserError, match="gone.safetensors cannot be read"):
        HFSource(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="model.safetensors.index.json cannot be read"):
        HFSource(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="has neither model.safetensors nor model.safetensors.index.json"):
        HFSource(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json holds no keys"):
        read_config(folder)


LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
        eos_token_id=128001, head_dim=64, hidden_act="silu", hidden_size=2048, initializer_range=0.02,
        intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False, model_type="llama",
        num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5,
        rope_scaling={"rope_type": "llama3", **LLAMA3}, rope_theta=500000.0, tie_word_embeddings=True,
        torch_dtype="bfloat16", transformers_version="4.45.0.dev0", use_cache=True, vocab_size=128256,
    ),
    "qwen2.5-0.5b": dict(
        architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643,
        hidden_act="silu", hidden_size=896, initializer_range=0.02, intermediate_size=4864,
        max_position_embeddings=32768, max_window_layers=24, model_type="qwen2", num_attention_heads=14,
        num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=32768,
        tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.40.1", use_cache=True,
        use_mrope=False, use_sliding_window=False, vocab_size=151936,
    ),
    "gpt2": dict(
        activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=50256,
        embd_pdrop=0.1, eos_token_id=50256, initializer_range=0.02, layer_norm_epsilon=1e-5, model_type="gpt2",
        n_ctx=1024, n_embd=768, n_head=12, n_layer=12, n_positions=1024, resid_pdrop=0.1, summary_activation=None,
        summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}, vocab_size=50257,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_our_presets(name):
    assert from_json(PUBLISHED[name]) == preset(name)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_may_be_left_out_is_what_their_library_takes(kind):
    turned = {"partial_rotary_factor": 1.0} if kind == "stablelm" else {}
    theirs = transformers.AutoConfig.for_model(kind, hidden_size=1536, num_attention_heads=32, **turned)
    values = json.loads(theirs.to_json_string())
    for key in FAMILIES[kind].missing:
        assert from_json({k: v for k, v in values.items() if k != key}) == from_json(values), key


def test_each_setting_finds_the_family_that_has_it():
    plain = replace(preset("tiny"), norm="rmsnorm")
    for changes, family in [
        ({}, "llama"),
        ({"rope_scaling": "linear", "rope_factor": 2.0}, "llama"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "bias": True}, "llama"),
        ({"qk_norm": True}, "qwen3"),
        ({"dropout": 0.1, "attention": "tiled"}, "llama"),
        ({"model_dim": 12, "num_heads": 4, "head_dim": 2}, "llama"),  # 12 / 4 is odd, which no rotary head can be
        ({"norm": "layernorm"}, "stablelm"),
        ({"norm": "layernorm", "qkv_bias": True}, "stablelm"),
    ]:
        assert family_for(replace(plain, **changes)).model_type == family


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_written(name):
    whole = preset(name)
    family = family_for(whole)
    assert from_json(to_json(whole, family)) == whole
    sizes = dict(vocab_size=7, max_positions=16, num_layers=1, hidden_dim=5)
    config = replace(whole, head_dim=2, model_dim=2 * whole.num_heads, **sizes)
    model = filled(config, 0)
    with folders() as folder:
        save(folder / "m", config, named(model))
        assert json.loads((folder / "m" / "config.json").read_text())["model_type"] == family.model_type
        check_alike(folder / "m", model, rows(config, 0))


@pytest.mark.parametrize(
    "name, value, beside",
    [
        ("deep", "x0", {"qk_norm": True}),
        ("mlp", "gelu", {"qk_norm": True}),
        ("positions", "learned", {"qk_norm": True}),
        ("rope_low", 2.0, {"qk_norm": True}),
        ("norm", "layernorm", {"qk_norm": True}),
        ("out_bias", True, {"norm": "layernorm"}),
        ("norm", "layernorm", {"mlp_bias": True}),
    ],
)
def test_a_setting_that_no_architecture_has_is_named(tmp_path, name, value, beside):
    config = replace(preset("tiny"), **({"norm": "rmsnorm"} | beside | {name: value}))
    with pytest.raises(UserError, match=rf"none of gpt2, llama, qwen2, qwen3, stablelm has {name} {value!r}"):
        save(tmp_path / "m", config, {})


@pytest.mark.parametrize("name, width", [("llama-3.2-1b", 5), ("tiny", 5), ("tiny", 8)])
def test_width_that_the_heads_do_not_make_up_is_refused(tmp_path, name, width):
    """Llama's may be another multiple of their number, StableLM's not."""
    config = preset(name, model_dim=width, num_heads=2, num_kv_heads=2, head_dim=2)
    with pytest.raises(UserError, match="none of gpt2, llama, qwen2, qwen3, stablelm has"):
        save(tmp_path / "m", config, {})


def lacking(weights: dict[str, torch.Tensor]) -> None:
    del weights["norm.weight"]


def too_many(weights: dict[str, torch.Tensor]) -> None:
    weights["norm.gain"] = torch.ones(4)


def misshapen(weights: dict[str, torch.Tensor]) -> None:
    weights["norm.weight"] = torch.ones(3)


def untied(weights: dict[str, torch.Tensor]) -> None:
    weights["head.weight"] = weights["embed.tokens.weight"] + 1


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lacking, "the weights lack norm.weight"),
        (too_many, "the weights have norm.gain"),
        (misshapen, r"norm.weight has the shape \(3,\), and the configuration says \(4,\)"),
        (untied, "head.weight is tied to embed.tokens.weight, and differs"),
    ],
)
def test_weights_that_do_not_fit_leave_nothing_behind(tmp_path, spoil, match):
    config = read_config(small(tmp_path))
    weights = named(GPT(config))
    spoil(weights)
    with pytest.raises(UserError, match=match):
        save(tmp_path / "m", config, weights)
    assert os.listdir(tmp_path) == ["llama"]


def test_a_tied_head_may_be_among_the_weights_and_dtypes_change(tmp_path):
    model = GPT(read_config(small(tmp_path)))
    save(tmp_path / "m", model.config, model.state_dict(), dtype=torch.bfloat16)
    half = {name: p.to(torch.bfloat16) for name, p in named(model).items()}
    assert same(named(load(tmp_path / "m")), half)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_the_configuration_says_is_not_for_extra_keys(tmp_path):
    model = GPT(read_config(small(tmp_path)))
    for extra, match in [({"hidden_size": 8}, "hidden_size is the configuration's"), ({"colour": 1}, "colour is 1")]:
        with pytest.raises(UserError, match=match):
            save(tmp_path / "m", model.config, named(model), extra=extra)
    with pytest.raises(UserError, match="is there already, and not empty"):
        save(tmp_path / "llama", model.config, named(model))


def test_shapes_are_the_models():
    for name in ("nano", "gpt2"):
        config = preset(name, num_layers=2, vocab_size=7, max_positions=5)
        assert shapes_of(config) == {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}


def test_changed_fields_may_add_what_starts_as_nothing(tmp_path):
    """Deep connections are the identity at the start: the model computes the same with them."""
    folder = small(tmp_path, num_layers=2)
    plain, deep = load(folder), load(folder, deep="x0")
    assert "deep.alpha" in named(deep)
    assert torch.equal(plain.logits(torch.tensor([[1, 2, 3]])), deep.logits(torch.tensor([[1, 2, 3]])))
    with pytest.raises(UserError, match=r"wte|embed_tokens.weight has the shape \(5, 4\)"):
        load(folder, vocab_size=6)


def test_a_name_is_a_folder_or_what_the_hub_has(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    asked = []
    monkeypatch.setitem(
        sys.modules,
        "huggingface_hub",
        SimpleNamespace(snapshot_download=lambda name, allow_patterns: asked.append(name) or str(tmp_path)),
    )
    assert resolve("some/model") == tmp_path and asked == ["some/model"]

    def refuse(name: str, allow_patterns: list[str]) -> str:
        raise OSError("no such repository")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=refuse))
    with pytest.raises(UserError, match="'some/model' is no folder, and the hub did not give it: no such repository"):
        resolve("some/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub, which could fetch it, is not installed"):
        resolve("some/model")


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    model = GPT(read_config(small(tmp_path)))
    monkeypatch.setattr("minispeed.model.hf.write.save_file", mock.Mock(side_effect=OSError("no room")))
    with pytest.raises(UserError, match=r"could not write .*: no room"):
        save(tmp_path / "m", model.config, named(model))
    shutil.rmtree(tmp_path / "llama")
    assert not os.listdir(tmp_path)
