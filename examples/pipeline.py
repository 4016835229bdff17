"""Train a language model cut into as many stages as there are ranks: a list of layers, one matrix at both its ends.

    python examples/pipeline.py
    torchrun --nproc-per-node 2 examples/pipeline.py
    torchrun --nproc-per-node 4 examples/pipeline.py --stages 2

The sentences count as Fibonacci did, modulo 11: each word follows from the two before it. The micro-batches of a step
pass through the stages one after the other, all stages at work at once, forwards and backwards in turn (1F1B:
Narayanan et al. 2021, section 2.2, https://arxiv.org/abs/2104.04473).
"""

import minispeed as deepspeed  # the only line to change

# isort: split
import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

V, T, D, HIDDEN = 11, 12, 32, 64  # words, words of a sentence, features of a word, hidden features


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--stages", type=int, help="as many as ranks, if not given")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser = deepspeed.add_config_arguments(parser)
    parser.set_defaults(deepspeed_config=str(Path(__file__).with_suffix(".json")))
    return parser.parse_args()


class Block(nn.Module):
    """Sees a word and the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.rise, self.fall = nn.Linear(2 * D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.norm(x)
        before = F.pad(seen, (0, 0, 1, 0))[:, :-1]
        return x + self.fall(F.gelu(self.rise(torch.cat([seen, before], dim=-1))))


def score_words(words: nn.Embedding, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, words.weight)


def loss_of(scores: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores[:, 1:].flatten(0, 1), following[:, 1:].flatten())


def make_layers() -> list[object]:
    """Return layers that are built later, where they are needed; the words' matrix is one, first and last."""
    words = ("words", nn.Embedding, V, D)
    return [
        deepspeed.pipe.TiedLayerSpec(*words),
        *(deepspeed.pipe.LayerSpec(Block) for _ in range(4)),
        deepspeed.pipe.LayerSpec(nn.LayerNorm, D),
        deepspeed.pipe.TiedLayerSpec(*words, forward_fn=score_words),
    ]


def make_rows(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return sentences and, of each word, the one that follows."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(number):
        words = torch.randint(V, (2,), generator=generator).tolist()
        while len(words) <= T:
            words.append((words[-1] + words[-2]) % V)
        rows.append((torch.tensor(words[:-1]), torch.tensor(words[1:])))
    return rows


def main() -> None:
    args = parse_arguments()
    deepspeed.init_distributed()
    net = deepspeed.pipe.PipelineModule(
        layers=make_layers(),
        num_stages=args.stages or deepspeed.comm.get_world_size(),
        loss_fn=loss_of,
        seed_layers=True,  # each layer begins with the same weights, wherever it lies
        seed_fn=torch.manual_seed,
        partition_method="type:block",
    )
    engine, _, _, _ = deepspeed.initialize(
        args=args, model=net, model_parameters=list(net.parameters()), training_data=make_rows(1024)
    )
    for step in range(args.steps):
        loss = engine.train_batch()
        if (step + 1) % 10 == 0 and deepspeed.comm.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.5f}", flush=True)


if __name__ == "__main__":
    main()
