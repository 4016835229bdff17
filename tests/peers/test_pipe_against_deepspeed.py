"""The same pipeline through both libraries: a list of layers with a tied matrix, a tuple on its way, and a function.

As in `test_against_deepspeed.py`, one function trains with whichever library it is given. Compared are every step's
loss and norm, the loss of an evaluation, and on each rank the parameters that DeepSpeed has there in the end. Values do
not depend on the stages in DeepSpeed only if every layer is seeded; so it is here. Nothing is clipped at ZeRO stage 0:
there DeepSpeed 0.19.8 takes the norm of the first stage's gradients alone.
"""

import importlib
import itertools
import logging
import os
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minispeed.collective.world import World
from minispeed.testing.pool import GlooPool

if find_spec("deepspeed") is None:
    raise ImportError("DeepSpeed is not installed: make peers, or pip install 'minispeed[peers]'")

pytestmark = pytest.mark.timeout(300)
LIBRARIES = ("minispeed", "deepspeed")
STEPS, MICROS, ROWS, T, V, D = 4, 3, 2, 5, 11, 6  # T words of a row, V words in all, D features
FP32 = 1e-6  # relative to a tensor's largest element

Found = dict[str, torch.Tensor]


class Block(nn.Module):
    """Adds to the first of a tuple, and hands the second on: whole numbers, as DeepSpeed wants what has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, both: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, places = both
        return x + torch.tanh(self.mix(self.norm(x + places.unsqueeze(-1) / T))), places


def train(library: Any, stages: int, stage: int, clip: float) -> Found:
    """Train a pipeline as any script of DeepSpeed's does; return what came of it on this rank."""
    words = ("words", nn.Embedding, V, D)
    net = library.pipe.PipelineModule(
        layers=[
            library.pipe.TiedLayerSpec(*words),
            lambda x: (x, torch.arange(x.shape[1]).expand(x.shape[:2]).contiguous()),
            *(library.pipe.LayerSpec(Block) for _ in range(4)),
            lambda both: both[0],
            library.pipe.TiedLayerSpec(*words, forward_fn=lambda words, x: F.linear(x, words.weight)),
        ],
        num_stages=stages,
        loss_fn=lambda scores, following: F.cross_entropy(scores.flatten(0, 1), following.flatten()),
        seed_layers=True,
        seed_fn=torch.manual_seed,
        partition_method="type:block",
    )
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICROS,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": dict(lr=2e-3, weight_decay=0.1, torch_adam=True)},
    }
    engine, _, _, _ = library.initialize(model=net, model_parameters=list(net.parameters()), config=config)
    replicas = library.comm.get_world_size() // stages
    replica = library.comm.get_rank() % replicas
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(engine.train_batch(micro_batches(step, replica, replicas)))
        norms.append(engine.get_global_grad_norm())
    losses.append(engine.eval_batch(micro_batches(STEPS, replica, replicas)))
    found = {f"parameters/{name}": p.detach().clone() for name, p in engine.module.named_parameters() if p.numel()}
    told = {} if None in norms else {"norms": torch.tensor(norms)}
    return {**found, **told, "losses": torch.tensor([float(loss) for loss in losses])}


def micro_batches(step: int, replica: int, replicas: int) -> Any:
    """Return this replica's (inputs, labels) of a step."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(V, (MICROS, replicas, ROWS, T + 1), generator=generator)[:, replica]
    return iter([(words[:, :-1], words[:, 1:]) for words in rows])


def train_with(world: World, name: str, stages: int, stage: int, clip: float) -> Found:
    """Train with a library.  A task of the pool's processes."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(world.rank)}
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    library = importlib.import_module(name)
    library.init_distributed()
    return train(library, stages, stage, clip)


@pytest.fixture(scope="module")
def pools():
    made = {(name, ranks): GlooPool(ranks) for name in LIBRARIES for ranks in (2, 4)}
    yield made
    for pool in made.values():
        pool.close()


@pytest.mark.parametrize(
    ("ranks", "stages", "stage", "clip"),
    [
        *itertools.product((2,), (1, 2), (0, 1), (0.0,)),
        *((ranks, stages, 1, 0.1) for ranks, stages in ((2, 1), (2, 2), (4, 2), (4, 4))),
    ],
)
def test_a_pipeline_is_the_same_run(pools, ranks, stages, stage, clip):
    ours, theirs = (
        pools[name, ranks].run(train_with, name, stages, stage, clip, ranks=ranks, timeout=200.0) for name in LIBRARIES
    )
    for mine, yours in zip(ours, theirs, strict=True):
        assert len(yours) > 4 and yours.keys() <= mine.keys()
        apart = {name: (mine[name] - x).abs().max() / x.abs().max() for name, x in yours.items()}
        assert {name: x for name, x in apart.items() if not x <= FP32} == {}
