"""Fill in masked words with a small BERT: checkpoints with a state of the script's own, and `--resume`.

    python examples/bert.py --checkpoints runs/bert
    torchrun --nproc-per-node 2 examples/bert.py --checkpoints runs/bert --resume --steps 80

A sentence counts up from anywhere, so the neighbours of a masked word give it away. As many words are masked in each
sentence, so the mean over them is the same whoever holds which sentences. What a step trains on depends on its number
alone: a run that was resumed prints the losses of one that was not.

Devlin et al. 2018, section 3.1, https://arxiv.org/abs/1810.04805     B sentences, T words of each, D model, V words.
"""

import minispeed as deepspeed  # the only line to change

# isort: split
import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

V, T, D = 16, 12, 32
MASK, NUM_MASKED = V, 2  # the word after the last


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoints", type=Path, help="directory to save in")
    parser.add_argument("--save_every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser = deepspeed.add_config_arguments(parser)
    parser.set_defaults(deepspeed_config=str(Path(__file__).with_suffix(".json")))
    return parser.parse_args()


class Bert(nn.Module):
    """An encoder of two layers, whose embedding of words also gives the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(V + 1, D)
        self.places = nn.Parameter(torch.empty(T, D))
        layer = nn.TransformerEncoderLayer(
            D, nhead=2, dim_feedforward=4 * D, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, norm=nn.LayerNorm(D), enable_nested_tensor=False)
        for p in (self.words.weight, self.places):
            nn.init.normal_(p, std=0.1)

    def forward(self, seen: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Return the loss at the places where `seen` (B, T) is masked; `words` (B, T) are the true ones."""
        x = self.encoder(self.words(seen) + self.places)
        is_masked = seen == MASK
        return F.cross_entropy(F.linear(x[is_masked], self.words.weight), words[is_masked])


def draw_sentences(num: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a step's sentences, masked and true, (num, T) each, and return this rank's rows of them."""
    generator = torch.Generator().manual_seed(step)
    words = (torch.randint(V, (num, 1), generator=generator) + torch.arange(T)) % V
    masked = torch.rand(num, T, generator=generator).argsort(1)[:, :NUM_MASKED]
    mine = slice(deepspeed.comm.get_rank(), None, deepspeed.comm.get_world_size())
    return words.scatter(1, masked, MASK)[mine], words[mine]


def mean_over_ranks(value: torch.Tensor) -> float:
    value = value.detach().clone()
    deepspeed.comm.all_reduce(value)
    return value.item() / deepspeed.comm.get_world_size()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)  # every rank begins with the same weights
    model = Bert()
    engine, _, _, _ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
    first, best = 0, float("inf")
    if args.resume:
        path, state = engine.load_checkpoint(args.checkpoints)
        if path is not None:
            first, best = state["step"], state["best"]
    for step in range(first, args.steps):
        seen, words = (x.to(engine.device) for x in draw_sentences(engine.train_batch_size(), step))
        micro, total = engine.train_micro_batch_size_per_gpu(), torch.zeros((), device=engine.device)
        for some_seen, some_words in zip(seen.split(micro), words.split(micro)):
            loss = engine(some_seen, some_words)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / engine.gradient_accumulation_steps()
        loss = mean_over_ranks(total)
        best = min(best, loss)
        if deepspeed.comm.get_rank() == 0:
            print(f"step {step + 1}: loss {loss:.6f}, best {best:.6f}, rate {engine.get_lr()[0]:.6f}", flush=True)
        if args.checkpoints and (step + 1) % args.save_every == 0:
            engine.save_checkpoint(args.checkpoints, client_state={"step": step + 1, "best": best})


if __name__ == "__main__":
    main()
