"""Tell small pictures apart: `initialize` is given the data, and returns the loader.

    python examples/image_classifier.py
    torchrun --nproc-per-node 2 examples/image_classifier.py

Each of ten classes is a pattern of its own; a picture is its class's pattern under as much noise. The batch in the
configuration is that of all ranks together, so two ranks print the losses that one rank prints.
"""

import minispeed as deepspeed  # the only line to change

# isort: split
import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

PICTURES, CLASSES, SIDE = 512, 10, 12


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser = deepspeed.add_config_arguments(parser)
    parser.set_defaults(deepspeed_config=str(Path(__file__).with_suffix(".json")))
    return parser.parse_args()


def make_pictures() -> TensorDataset:
    """Return pictures (PICTURES, 3, SIDE, SIDE) and their classes (PICTURES)."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(CLASSES, 3, SIDE, SIDE, generator=generator)
    classes = torch.randint(CLASSES, (PICTURES,), generator=generator)
    noise = torch.randn(PICTURES, 3, SIDE, SIDE, generator=generator)
    return TensorDataset(patterns[classes] + noise, classes)


class Classifier(nn.Module):
    """Two convolutions, each of which halves the sides, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 16, kernel_size=3, stride=2, padding=1)
        self.last = nn.Linear(16 * (SIDE // 4) ** 2, CLASSES)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(pictures))
        x = F.relu(self.second(x))
        return self.last(x.flatten(1))


def mean_over_ranks(value: torch.Tensor) -> float:
    value = value.detach().clone()
    deepspeed.comm.all_reduce(value)
    return value.item() / deepspeed.comm.get_world_size()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)  # every rank begins with the same weights
    model = Classifier()
    engine, _, loader, _ = deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=make_pictures()
    )
    for epoch in range(args.epochs):
        total, num_right = torch.zeros(2, device=engine.device)
        for pictures, classes in loader:
            pictures, classes = pictures.to(engine.device), classes.to(engine.device)
            scores = engine(pictures)
            loss = F.cross_entropy(scores, classes)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(loader)
            num_right += (scores.argmax(1) == classes).float().mean() / len(loader)
        loss, share = mean_over_ranks(total), mean_over_ranks(num_right)
        if deepspeed.comm.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {loss:.6f}, {share:.1%} right", flush=True)


if __name__ == "__main__":
    main()
