"""Laws that need a GPU: the same numbers as on the CPU. And the GPU benchmark, which also runs on a CPU.

Ranks are threads that share one GPU, so a whole layout is proved on a single card.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from laws import test_lattice as lattice
from test_attention import problems

from minispeed.collective.launch import launch
from minispeed.engine import Engine, MicroBatch, Report
from minispeed.model.attention import fused, reference
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.mask import Mask
from minispeed.precision import Precision
from minispeed.schedules import constant
from minispeed.testing.models import small_configs

DEVICE = "cuda"
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SHARE = max(1, settings().max_examples // 5)  # of the draws: kernels of a few elements are slow to start


def moved(rows: MicroBatch) -> MicroBatch:
    return MicroBatch(*(field.to(DEVICE) for field in rows))


@pytest.mark.gpu
@pytest.mark.timeout(600)
@given(lattice.cases())
@settings(max_examples=SHARE, print_blob=True)
def test_every_layout_on_the_gpu_is_the_training_run_on_the_cpu(case):
    build, rows = lattice.build, lattice.rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lattice, "build", lambda case: build(case).to(DEVICE))
        patch.setattr(lattice, "rows", lambda case, step: moved(rows(case, step)))
        ran = launch(lambda world: lattice.sharded(case, world.group), ranks=case.ranks, device=DEVICE)
    assert all(tensor.device.type == DEVICE for _, parameters in ran for tensor in parameters.values())
    lattice.check(case, [(reports, {name: t.cpu() for name, t in parameters.items()}) for reports, parameters in ran])


def trained(config: GPTConfig, stage: int, seed: int, device: str) -> tuple[list[Report], dict[str, torch.Tensor]]:
    """Train three steps on a device; return reports and parameters."""
    model = GPT(config, seed=seed).to(device, torch.float64)
    engine = Engine(
        model, precision=Precision(torch.float64), schedule=constant, lr=1e-3, weight_decay=0.1, clip=1.0, zero=stage
    )
    reports = []
    for step in range(3):
        generator = torch.Generator().manual_seed(seed + step)
        drawn = torch.randint(config.vocab_size, (2, 7), generator=generator)
        places, zeros = torch.arange(6).expand(2, 6).contiguous(), torch.zeros(2, 6, dtype=torch.int64)
        rows = MicroBatch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous(), places, zeros, zeros)
        reports.append(engine.train_step([MicroBatch(*(field.to(device) for field in rows))]))
    with engine.sharded.gathered():
        return reports, {name: p.detach().clone().cpu() for name, p in model.named_parameters()}


@pytest.mark.gpu
@pytest.mark.timeout(600)
@given(small_configs(), st.integers(0, 3), st.integers(0, 2**31))
@settings(max_examples=SHARE)
def test_the_engine_on_the_gpu_is_the_engine_on_the_cpu(config, stage, seed):
    (reports, parameters), (expected, wanted) = (trained(config, stage, seed, device) for device in (DEVICE, "cpu"))
    for got, told in zip(reports, expected, strict=True):
        for name in ("loss", "norm"):
            assert getattr(got, name) == pytest.approx(getattr(told, name), rel=1e-10, abs=1e-10)
    lattice.assert_close(parameters, wanted)


def outcome(attention, inputs: list[torch.Tensor], mask: Mask) -> list[torch.Tensor]:
    """Return the output and the gradients of its product with fixed numbers, all on the CPU in fp64."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attention(*inputs, mask)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = [out, *torch.autograd.grad((out * weights.to(out.device, out.dtype)).sum(), inputs)]
    return [x.detach().to("cpu", torch.float64) for x in results]


def on_device(mask: Mask) -> Mask:
    there = {name: None if x is None else x.to(DEVICE) for name, x in (("queries", mask.queries), ("keys", mask.keys))}
    return replace(mask, **there, _biases={})


@pytest.mark.gpu
@given(problems())
def test_fused_attention_on_the_gpu_is_the_formula_on_the_cpu(problem):
    inputs, mask = problem
    got = outcome(fused, [x.to(DEVICE) for x in inputs], on_device(mask))
    for tensor, wanted in zip(got, outcome(reference, inputs, mask), strict=True):
        assert (tensor - wanted).abs().max() <= 1e-10 * max(1, wanted.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [4, 1])
def test_half_precision_kernels_are_the_formula_up_to_rounding(groups, packed, dtype):
    """At a shape for which the fast kernels exist; the formula runs in fp64, on the same rounded numbers."""
    generator = torch.Generator().manual_seed(groups)
    shapes = [(2, 4, 100, 64), *[(2, groups, 100, 64)] * 2]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    documents = (torch.arange(100).expand(2, 100) // 37).contiguous() if packed else None
    mask = Mask(100, 100, queries=documents, keys=documents)
    got = outcome(fused, [x.to(DEVICE) for x in inputs], on_device(mask))
    for tensor, wanted in zip(got, outcome(reference, [x.to(torch.float64) for x in inputs], mask), strict=True):
        assert (tensor - wanted).abs().max() <= 0.03 * max(1, wanted.abs().max().item())


# ------------------------------------------------------------------------------------------ benchmarks/gpu_step.py


@pytest.fixture
def gpu_step(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_step

    return gpu_step


@pytest.mark.parametrize("group", ["solo", "torch"])
def test_every_contestant_trains_the_same(gpu_step, monkeypatch, capsys, group):
    wrapped, wrap = [], gpu_step.DistributedDataParallel
    monkeypatch.setattr(gpu_step, "DistributedDataParallel", lambda model: wrapped.append(model) or wrap(model))
    words = "--tiny --device cpu --batch 2 --steps 2 --repeats 1 --group".split()
    rows = gpu_step.main([*words, group])
    names = ["plain", "plain, packed", "ddp", "zero 0", "zero 1", "zero 2", "zero 3"]
    assert [row["contestant"] for row in rows] == names
    assert len(wrapped) == 1
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    assert all(row["last loss"] == pytest.approx(rows[0]["last loss"], rel=1e-3) for row in rows)
    assert all(row["last loss"] < row["first loss"] - 0.01 for row in rows)
    assert all(row["MFU"] is None and row["peak bytes"] is None and row["tokens/s"] > 0 for row in rows)


def test_a_contestant_that_computes_something_else_is_refused(gpu_step, monkeypatch):
    monkeypatch.setattr(gpu_step, "ours", lambda model, group, stage: lambda rows: 1.0)
    with pytest.raises(AssertionError, match="zero 0: first loss 1.0, the plain loop's"):
        gpu_step.main("--tiny --device cpu --batch 1 --steps 1 --repeats 1".split())


@given(st.integers(0, 6), st.integers(0, 7))
def test_rows_are_halved_until_they_fit(exponent, fits):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import gpu_step

        def compare(model, group, rows):
            if rows > fits:
                raise torch.OutOfMemoryError("too many rows")
            return {}

        patch.setattr(gpu_step, "compare", compare)
        if fits:
            expected = max(2**e for e in range(exponent + 1) if 2**e <= fits)
            assert gpu_step.fitting(None, None, lambda batch: batch, 2**exponent) == (expected, {})
        else:
            with pytest.raises(torch.OutOfMemoryError):
                gpu_step.fitting(None, None, lambda batch: batch, 2**exponent)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", None),
        ("Some other device", None),
    ],
)
def test_a_peak_is_that_of_the_device_or_unknown(gpu_step, name, tera):
    peak = gpu_step.peak_flops(name)
    assert peak == (None if tera is None else tera * 1e12)
    assert gpu_step.utilisation(1000, 1e9, peak) == (None if tera is None else pytest.approx(6 / tera))
