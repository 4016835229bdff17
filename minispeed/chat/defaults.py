"""Fill in what was not said, by the case, and say why.

From scratch and from a trained model want learning rates a hundred times apart; a run that silently takes the wrong one
wastes an evening. Each value chosen here is printed with its reason and written into the run.
"""

from dataclasses import dataclass, replace
from typing import Any

from minispeed.chat.sft_options import SftOptions
from minispeed.errors import UserError
from minispeed.model.config import GPTConfig

DEFAULT_SEQ = 512


@dataclass(frozen=True)
class Choice:
    """A value for an option that was left open, and why this one."""

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        shown = f"{self.value:.2g}" if isinstance(self.value, float) else self.value
        return f"--{self.name.replace('_', '-')} {shown}: {self.reason}"


def fill_in(options: SftOptions, config: GPTConfig, *, from_scratch: bool) -> tuple[SftOptions, list[Choice]]:
    """Return the options with every open one but the number of steps chosen, and the choices made."""
    batch = options.batch or (16 if from_scratch else 8)
    offered = [
        Choice("seq", min(DEFAULT_SEQ, config.max_positions), "or less if the model reads less"),
        Choice("batch", batch, "from scratch" if from_scratch else "fine-tuning takes few rows"),
        micro_rows(options, batch),
        # 1.3e-3 at D = 192, where twice as much learns the skills slower; 3.3e-4 at D = 768
        Choice("lr", 0.25 / config.model_dim, f"0.25 / width {config.model_dim}, from scratch")
        if from_scratch
        else Choice("lr", 2e-5, "a trained model is moved gently"),
        Choice("weight_decay", 0.1, "from scratch") if from_scratch else Choice("weight_decay", 0.0, "fine-tuning"),
        Choice("warmup", 100 if from_scratch else 10, "from scratch" if from_scratch else "fine-tuning"),
    ]
    if options.steps is None and options.epochs is None and options.minutes is None:
        offered.append(Choice("epochs", 3, "none of --steps, --epochs, --minutes is given"))
    made = [choice for choice in offered if getattr(options, choice.name) is None]
    return replace(options, **{choice.name: choice.value for choice in made}), made


def count_ranks(options: SftOptions) -> SftOptions:
    """Return the options with the number of ranks: what the axes multiply to, where it is not said.

    Raises  UserError if it is said, and another
    """
    model = options.pp * options.sp * options.tp
    ranks = options.ranks or model * (options.dp or 1)
    if ranks % model or (options.dp and ranks != model * options.dp):
        sides = (
            f"{f'--dp {options.dp} x ' if options.dp else ''}--pp {options.pp} x --sp {options.sp} x --tp {options.tp}"
        )
        what = f"{sides} = {model * (options.dp or 1)} ranks, but --ranks is {ranks}"
        raise UserError(what, fix=f"--ranks {model * (options.dp or 1)}, or no --ranks")
    return replace(options, ranks=ranks)


def micro_rows(options: SftOptions, batch: int) -> Choice:
    """Choose the rows that go through the model at once: all that a replica has, or enough to fill a pipeline."""
    replicas = (options.ranks or 1) // (options.pp * options.sp * options.tp)
    rows = max(1, batch // max(1, replicas))
    if options.pp == 1:
        return Choice("micro_batch", min(batch, 16), "as many rows at once as the batch has, at most 16")
    least = min(rows, 2 * options.pp)
    able = [size for size in range(1, rows + 1) if rows % size == 0 and rows // size >= least]
    size = max([one for one in able if rows // one % options.pp == 0] or able)
    return Choice("micro_batch", size, f"{rows // size} micro-batches fill a pipeline of {options.pp}")
