"""What a script prints, on which ranks, and how it seeds: `logger`, `log_dist`, `set_random_seed` and their like.

Before `init_distributed` nobody knows which rank this is, and everybody prints.
"""

import logging
import random
from collections.abc import Sequence

import numpy as np
import torch

from minispeed.collective.world import current_world
from minispeed.deepspeed.accelerator import get_accelerator
from minispeed.deepspeed.start import is_initialized

GIGABYTE = 2**30
EVERYBODY = -1  # in a list of ranks


class _Printing(logging.Handler):
    """To wherever `print` goes at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record))


def _make_logger() -> logging.Logger:
    made = logging.getLogger("minispeed")
    made.setLevel(logging.INFO)
    made.propagate = False
    printing = _Printing()
    printing.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s"))
    made.handlers[:] = [printing]
    return made


logger = _make_logger()


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log a message, the rank before it, on these ranks of the world; without ranks, or with -1 first, on all.

    DeepSpeed says nothing where no ranks are given.
    """
    if _is_among(ranks):
        logger.log(level, _from_rank(message))


def print_dist(message: str, ranks: Sequence[int] | None = None) -> None:
    """Do as `log_dist`, whatever the level of `logger` is."""
    if _is_among(ranks):
        print(_from_rank(message))


def print_rank_0(message: object) -> None:
    """Print on rank 0 alone."""
    if _is_among([0]):
        print(message)


def set_random_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's random numbers. Ranks that are threads share them all."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def see_memory_usage(message: str, force: bool = False) -> None:
    """Print on rank 0 what memory is in use, in gigabytes, and the most so far; nothing unless `force`."""
    if not force:
        return
    accelerator = get_accelerator()
    held = {
        "allocated": accelerator.memory_allocated(),
        "most": accelerator.max_memory_allocated(),
        "reserved": accelerator.memory_reserved(),
        "most reserved": accelerator.max_memory_reserved(),
    }
    print_rank_0(f"{message}: " + ", ".join(f"{name} {size / GIGABYTE:.2f} GB" for name, size in held.items()))
    accelerator.reset_peak_memory_stats()


def _is_among(ranks: Sequence[int] | None) -> bool:
    return not is_initialized() or not ranks or ranks[0] == EVERYBODY or current_world().rank in ranks


def _from_rank(message: str) -> str:
    return f"[Rank {current_world().rank if is_initialized() else EVERYBODY}] {message}"
