"""Turn queries and keys by their positions, so that their product knows how far apart they are.

Rotary positions: Su et al. 2021, section 3.2 (https://arxiv.org/abs/2104.09864). For rows longer than a model was
trained on, positions are interpolated: Chen et al. 2023 (https://arxiv.org/abs/2306.15595); in Llama 3 for slow pairs.

Letters: B batch, T tokens, H heads, K head dim.
"""

import math

import torch
from torch import Tensor

from minispeed.model.config import GPTConfig


def rotary_angles(positions: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position x frequency.  (B, T) -> (B, 1, T, K/2) twice, fp64

    RoFormer, Su et al. 2021, section 3.2.2.
    """
    angles = positions[:, None, :, None].to(torch.float64) * rotary_frequencies(config, positions.device)
    return angles.cos(), angles.sin()


def rotary_frequencies(config: GPTConfig, device: torch.device | None = None) -> Tensor:
    """Return by how much each pair of features turns from one position to the next, in radians.  (K/2,), fp64

    Pair p turns by theta^(-2p / K), less where the angles are scaled: all pairs alike ("linear": positions are
    interpolated), or only those that turn seldom in the rows that the model first learnt from ("llama3": between
    rope_low and rope_high turns the share that is kept grows evenly), which tell far from near, while quick ones tell
    neighbours apart.

    Chen et al. 2023, section 2.3 (https://arxiv.org/abs/2306.15595). Llama 3: Grattafiori et al. 2024, section 3.4.2
    (https://arxiv.org/abs/2407.21783) tells of its long rows; the formula is the released model's.
    """
    K = config.head_dim
    frequencies = config.rope_theta ** -(torch.arange(0, K, 2, dtype=torch.float64, device=device) / K)
    slowed = frequencies / config.rope_factor
    if config.rope_scaling != "llama3":
        return slowed
    turns = config.rope_original * frequencies / (2 * math.pi)
    kept = ((turns - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * slowed


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Turn features p and p + K/2 of each head by the angle of their position.  (B, H, T, K) -> the same

    The pairing of the published Llama weights (the paper pairs neighbours: the same up to an order of features).
    """
    cos, sin = turns
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
