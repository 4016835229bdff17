"""Train a generator and a critic against each other: two engines in one script.

    python examples/gan.py
    torchrun --nproc-per-node 2 examples/gan.py

The real points lie around (2, -1) in a plane. The critic learns which points are real, the generator to make such
as the critic takes for real (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661). The two losses chase each
other; what falls is the distance between the mean of the generator's points and that of the real ones.
"""

import minispeed as deepspeed  # the only line to change

# isort: split
import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

NOISE, HIDDEN = 4, 32
CENTRE = torch.tensor([2.0, -1.0])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser = deepspeed.add_config_arguments(parser)
    parser.set_defaults(deepspeed_config=str(Path(__file__).with_suffix(".json")))
    return parser.parse_args()


def make_net(num_in: int, num_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(num_in, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, num_out))


def draw_rows(num_rows: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw all ranks' real points (num_rows, 2) and noise (num_rows, NOISE), and return this rank's rows."""
    generator = torch.Generator().manual_seed(step)
    real = CENTRE + 0.5 * torch.randn(num_rows, 2, generator=generator)
    noise = torch.randn(num_rows, NOISE, generator=generator)
    mine = slice(deepspeed.comm.get_rank(), None, deepspeed.comm.get_world_size())
    return real[mine], noise[mine]


def loss_of(scores: torch.Tensor, is_real: bool) -> torch.Tensor:
    target = torch.full_like(scores, float(is_real))
    return F.binary_cross_entropy_with_logits(scores, target)


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().clone()
    deepspeed.comm.all_reduce(value)
    return value / deepspeed.comm.get_world_size()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)  # every rank begins with the same weights
    nets = make_net(NOISE, 2), make_net(2, 1)
    generator, critic = (
        deepspeed.initialize(args=args, model=net, model_parameters=net.parameters())[0] for net in nets
    )
    device = generator.device
    for step in range(args.steps):
        real, noise = (x.to(device) for x in draw_rows(generator.train_batch_size(), step))
        made = generator(noise)

        critic.zero_grad()  # the generator's backward has left some there
        critic_loss = loss_of(critic(real), True) + loss_of(critic(made.detach()), False)
        critic.backward(critic_loss)
        critic.step()

        generator.zero_grad()
        generator_loss = loss_of(critic(made), True)
        generator.backward(generator_loss)
        generator.step()

        if (step + 1) % 10 == 0:
            losses = mean_over_ranks(torch.stack([critic_loss, generator_loss]))
            distance = (mean_over_ranks(made.mean(0)) - CENTRE.to(device)).norm()
            if deepspeed.comm.get_rank() == 0:
                line = f"critic {losses[0]:.5f}, generator {losses[1]:.5f}, distance {distance:.5f}"
                print(f"step {step + 1}: {line}", flush=True)


if __name__ == "__main__":
    main()
