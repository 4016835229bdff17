"""Throw activations away in the forward and compute them again in the backward: memory for about a third more time.

A block keeps a dozen tensors of (B, T, D) for its backward. Recomputed, it keeps its input alone, and runs its forward
a second time when its backward comes. What can be recomputed:

    "all"         every block                   "attention"   the attention core alone: the (T, T) scores of `reference`
    "2", "3" ...  every second, third block     "none"        nothing

Chen et al. 2016, Training deep nets with sublinear memory cost, section 3 (https://arxiv.org/abs/1604.06174);
attention alone: Korthikanti et al. 2022, section 5 (https://arxiv.org/abs/2205.05198).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.utils.checkpoint

from minispeed.errors import UserError
from minispeed.model.gpt import GPT, Attention

EVERY = {"none": 0, "attention": 0, "all": 1}  # blocks from one that is recomputed to the next; 0: none is


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)`, keep only its inputs, and call it again in the backward, with the same random numbers.

    Returns  what `function` returns
    """
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def recompute(model: GPT, what: str) -> None:
    """Choose what of a GPT is recomputed: "none", "all", "attention" or every n-th block.

    Raises  UserError for another word, or a number that is not at least 1
    """
    every = EVERY[what] if what in EVERY else int(what) if what.isdecimal() else 0
    if what not in EVERY and every < 1:
        raise UserError(f"cannot recompute {what!r}", fix="none, all, attention, or a number: every so many blocks")
    model.recomputed = frozenset(f"blocks.{index}" for index in range(len(model.blocks)) if every and not index % every)
    for module in model.modules():
        if isinstance(module, Attention):
            core: Any = module.core
            if isinstance(core, partial) and core.func is checkpoint:
                (core,) = core.args
            module.core = partial(checkpoint, core) if what == "attention" else core
