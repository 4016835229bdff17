"""The same script through both libraries: DeepSpeed's own run is the measure of `import minispeed as deepspeed`.

One function trains with whichever library it is given; nothing in it knows which. Both start from the same weights and
rows, on gloo. Compared are every loss and what `backward` returns, every step's gradient norm, learning rate and betas,
the first step's gradients, and in the end all counts, parameters, masters and moments, each tensor whole.
`make peers` installs DeepSpeed and runs this; `make test` does not collect this folder.

What DeepSpeed 0.19.8 does not tell is not compared: at stage 0 masters, moments, and the norm where nothing is clipped.
Not run are its stage 0 in bf16, which begins with an update by no gradient, and its fp16, which wants a GPU.
"""

import importlib
import itertools
import logging
import os
import warnings
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from minispeed.collective.world import World
from minispeed.testing.pool import GlooPool

if find_spec("deepspeed") is None:
    raise ImportError("DeepSpeed is not installed: make peers, or pip install 'minispeed[peers]'")

pytestmark = pytest.mark.timeout(300)  # the first import of DeepSpeed may compile
LIBRARIES = ("minispeed", "deepspeed")
STEPS, ROWS, T, V, D = 6, 2, 5, 11, 6  # T words of a row, V words in all, D model
FP32 = 1e-6  # relative to a tensor's largest element; a sum in another order costs about 1e-7
BF16 = 2.0**-5  # likewise: eight roundings

ADAM = dict(lr=2e-3, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.1, torch_adam=True)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": dict(type="Adam", params=dict(ADAM, adam_w_mode=False)),
    "AdamW": dict(type="AdamW", params=ADAM),
    "Adam by default": dict(type="Adam", params=dict(torch_adam=True)),
    "SGD": dict(type="SGD", params=dict(lr=2e-3, momentum=0.9)),
}
BROUGHT: dict[str, Any] = {  # from the model: an optimizer, or what makes one of parameters
    "brought AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1),
    "brought SGD": lambda model: torch.optim.SGD(model.parameters(), lr=2e-3, momentum=0.9),
    "brought in groups": lambda model: torch.optim.AdamW(
        [
            dict(params=[p for p in model.parameters() if p.ndim > 1], lr=2e-3, weight_decay=0.1),
            dict(params=[p for p in model.parameters() if p.ndim < 2], lr=1e-3, weight_decay=0.0),
        ]
    ),
    "made AdamW": lambda model: lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=0.1),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "WarmupLR": dict(warmup_num_steps=3),
    "WarmupDecayLR": dict(warmup_num_steps=3, warmup_max_lr=5e-3, total_num_steps=5),
    "WarmupCosineLR": dict(warmup_num_steps=3, total_num_steps=5),
    "OneCycle": dict(
        cycle_min_lr=1e-4, cycle_max_lr=5e-3, cycle_first_step_size=2, decay_step_size=1, decay_lr_rate=0.5
    ),
    "LRRangeTest": dict(lr_range_test_min_lr=1e-4, lr_range_test_step_size=2, lr_range_test_step_rate=3.0),
}
PAIRS = [
    *((optimizer, "constant") for optimizer in (*OPTIMIZERS, *BROUGHT)),
    *(("AdamW", schedule) for schedule in SCHEDULES),
    ("brought in groups", "WarmupLR"),
    ("AdamW", "made LambdaLR"),
]


@dataclass(frozen=True)
class Case:
    """One configuration; gradients are added up in `accumulate`."""

    ranks: int
    stage: int
    accumulation: int
    clip: float
    optimizer: str = "AdamW"
    schedule: str = "constant"
    dtype: str = "fp32"
    accumulate: str | None = None

    def __str__(self) -> str:
        words = [f"{self.ranks} ranks", f"stage {self.stage}", f"{self.accumulation} micro", f"clip {self.clip}"]
        words += [self.optimizer, self.schedule, self.dtype]
        return ", ".join(words if self.accumulate is None else [*words, f"added in {self.accumulate}"])

    @property
    def config(self) -> dict[str, Any]:
        """Return it as both libraries take it.

        Everything is cut, down to the smallest parameter. `memory_efficient_linear` would put another function in the
        place of torch's `linear`, which rounds its gradients elsewhere.
        """
        zero = dict(stage=self.stage, stage3_param_persistence_threshold=0, memory_efficient_linear=False)
        made: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self.dtype == "bf16"},
            "data_types": {"grad_accum_dtype": self.accumulate},
        }
        if self.optimizer in OPTIMIZERS:
            made["optimizer"] = OPTIMIZERS[self.optimizer]
        if self.schedule in SCHEDULES:
            made["scheduler"] = dict(type=self.schedule, params=SCHEDULES[self.schedule])
        return made


class Net(nn.Module):
    """A small language model: the embedding also gives the scores; `never` is used nowhere, and `still` is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(V, D)
        self.mix = nn.Linear(D, 8)
        self.norm = nn.LayerNorm(8)
        self.still = nn.Linear(8, 8).requires_grad_(False)
        self.back = nn.Linear(8, D, bias=False)
        self.never = nn.Linear(2, 3)

    def forward(self, words: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        x = self.words(words)
        x = x + self.back(torch.tanh(self.still(self.norm(self.mix(x)))))
        return F.cross_entropy(F.linear(x, self.words.weight).flatten(0, 1), following.flatten())


@dataclass
class Run:
    """What one library has made of a case, on one rank: numbers and tensors by their names."""

    numbers: dict[str, list[Any]]
    tensors: dict[str, torch.Tensor]


def train(library: Any, case: Case, rank: int) -> Run:
    """Train a model as any script of DeepSpeed's does."""
    torch.manual_seed(0)
    model = Net().bfloat16().float()  # DeepSpeed's masters begin with the rounded weights, ours with the weights
    engine, optimizer, _, _ = library.initialize(
        model=model,
        model_parameters=model.parameters(),
        optimizer=BROUGHT[case.optimizer](model) if case.optimizer in BROUGHT else None,
        lr_scheduler=halve_each_step if case.schedule == "made LambdaLR" else None,
        config=case.config,
    )
    run = Run({name: [] for name in ("losses", "returned", "norms", "rates", "momenta", "counts")}, {})
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(V, (case.accumulation, case.ranks, ROWS, T + 1), generator=generator)
        for micro, words in enumerate(rows[:, rank]):
            loss = engine(words[:, :-1], words[:, 1:])
            run.numbers["losses"].append(loss.item())
            run.numbers["returned"].append(engine.backward(loss).item())
            if step == 0 and micro == case.accumulation - 1:
                run.tensors |= whole("gradients", library.utils.safe_get_full_grad, model)
            engine.step()
        run.numbers["norms"].append(engine.get_global_grad_norm())
        run.numbers["rates"].append(engine.get_lr())
        run.numbers["momenta"].append([group.get("betas", group.get("momentum")) for group in optimizer.param_groups])
    run.numbers["counts"] = [engine.global_steps, engine.micro_steps, engine.global_samples, engine.skipped_steps]
    run.tensors |= state_of(library, model, with_moments=case.optimizer.startswith("Adam"))
    engine.destroy()
    return run


def halve_each_step(optimizer: Any) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def state_of(library: Any, model: nn.Module, *, with_moments: bool) -> dict[str, torch.Tensor]:
    """Return the model's parameters, masters and moments."""
    tensors = whole("masters", library.utils.safe_get_full_fp32_param, model)
    if with_moments:
        read = library.utils.safe_get_full_optimizer_state
        tensors |= whole("first moments", lambda p: read(p, "exp_avg"), model)
        seconds = whole("second moments", lambda p: read(p, "exp_avg_sq"), model)
        tensors |= {name: x.sqrt() for name, x in seconds.items()}  # what an update divides by
    with library.zero.GatheredParameters(list(model.parameters())):
        return tensors | {f"parameters/{name}": p.detach().clone() for name, p in model.named_parameters()}


def whole(kind: str, read: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what `read` finds of each parameter that is trained."""
    found = {f"{kind}/{name}": read(p) for name, p in model.named_parameters() if p.requires_grad}
    return {name: x.detach().clone() for name, x in found.items() if x is not None}


def train_with(world: World, name: str, case: Case) -> Run:
    """Train with a library.  A task of the pool's processes."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(world.rank)}
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    return train(importlib.import_module(name), case, world.rank)


Pools = dict[tuple[str, int], GlooPool]


@pytest.fixture(scope="module")
def pools():
    """Processes for each library and number of ranks: DeepSpeed puts functions of its own in the place of torch's."""
    made = {(name, ranks): GlooPool(ranks) for name in LIBRARIES for ranks in (1, 2)}
    yield made
    for pool in made.values():
        pool.close()


def differences(pools: Pools, case: Case) -> dict[str, float]:
    """Return how far the libraries are apart in all that DeepSpeed tells, over all ranks."""
    ours, theirs = (
        pools[name, case.ranks].run(train_with, name, case, ranks=case.ranks, timeout=200.0) for name in LIBRARIES
    )
    found: dict[str, list[float]] = defaultdict(list)
    for mine, yours in zip(ours, theirs, strict=True):
        for name, x in yours.tensors.items():
            found[name].append(apart(mine.tensors[name], x))
        for name, values in yours.numbers.items():
            if None not in values:
                both = (torch.tensor(numbers, dtype=torch.float64) for numbers in (mine.numbers[name], values))
                found[name].append(apart(*both))
    return {name: torch.tensor(each).max().item() for name, each in found.items()}  # one that is no number stays so


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference between elements, relative to the largest element."""
    most = (ours.double() - theirs.double()).abs().max().item()
    return most / theirs.abs().max().item() if most else 0.0


def check(pools: Pools, case: Case, most: float) -> None:
    found = differences(pools, case)
    assert case.stage == 0 or {"norms", "gradients/words.weight", "masters/words.weight"} <= found.keys()
    assert {name: x for name, x in found.items() if not x <= most} == {}


@pytest.mark.parametrize(("optimizer", "schedule"), PAIRS)
@pytest.mark.parametrize(
    ("ranks", "stage", "accumulation", "clip"), [*itertools.product((1, 2), (0, 1, 2, 3), (1, 3), (0.0, 1.0))]
)
def test_fp32_is_the_same_run(pools, ranks, stage, accumulation, clip, optimizer, schedule):
    check(pools, Case(ranks, stage, accumulation, clip, optimizer, schedule), FP32)


@pytest.mark.parametrize("accumulate", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("ranks", "stage", "accumulation", "clip"), [*itertools.product((1, 2), (1, 2, 3), (1, 2, 4), (0.0, 1.0))]
)
def test_bf16_is_the_same_run_where_halving_is_exact(pools, ranks, stage, accumulation, clip, accumulate):
    """Half a loss has the loss's digits: it is one whether losses or gradients are divided by the accumulation."""
    check(pools, Case(ranks, stage, accumulation, clip, dtype="bf16", accumulate=accumulate), FP32)


@pytest.mark.parametrize(("optimizer", "schedule"), PAIRS)
@pytest.mark.parametrize(("ranks", "stage"), [*itertools.product((1, 2), (1, 2, 3))])
def test_bf16_is_the_same_run_as_far_as_it_rounds(pools, ranks, stage, optimizer, schedule):
    """DeepSpeed rounds a third of the loss before its backward; ours divides the sum of the gradients."""
    check(pools, Case(ranks, stage, 3, 1.0, optimizer, schedule, dtype="bf16"), BF16)
