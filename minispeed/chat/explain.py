"""Say what a DeepSpeed configuration comes to: every value and where it is from, what has no effect, what it costs.

The costs are the closed forms of `minispeed.ledger`, which the tests compare with real runs to the byte: what a rank
holds from one step to the next. Padding (up to N - 1 elements of each layer) and activations are left out.

ZeRO, Rajbhandari et al. 2020, sections 3.1 and 5. https://arxiv.org/abs/1910.02054
Letters: N ranks.
"""

import json

from minispeed.chat.commands import ExplainOptions
from minispeed.config import Config, read_config, values_of
from minispeed.config.page import page
from minispeed.errors import UserError
from minispeed.ledger import Widths, held, sent
from minispeed.sizes import parse_count


def explain(options: ExplainOptions) -> int:
    """Do `minispeed explain`. Returns the exit code."""
    if options.keys:
        print(page(), end="")
        return 0
    if options.file is None:
        raise UserError("explain needs a configuration to read", fix="minispeed explain ds_config.json, or --keys")
    parameters = None if options.parameters is None else read_count(options.parameters)
    config = read_config(options.file, data_parallel=options.ranks)
    print(f"{options.file} on {options.ranks} data-parallel rank{'s' * (options.ranks != 1)}\n")
    print("\n".join(value_lines(config)), flush=True)
    if config.notes:
        print("", *config.notes, sep="\n")
    print("", *cost_lines(config, options.ranks, parameters and parameters // options.pp), sep="\n")
    print("", *message_lines(config, options.ranks, options.pp), sep="\n")
    return 0


def read_count(text: str) -> int:
    """Return a number of parameters that is written like 124M or 1.3B."""
    try:
        return parse_count(text)
    except UserError:
        what = f"--parameters must be a number such as 124M or 1.3B; got {text!r}"
        raise UserError(what, fix="--parameters 124M") from None


def value_lines(config: Config) -> list[str]:
    """Return the value of every honoured key, and where it is from."""
    rows = [(name, json.dumps(value), config.origins[name]) for name, value in values_of(config).items()]
    names, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{name:{names}}  {value:{values}}  {origin}" for name, value, origin in rows]


def cost_lines(config: Config, ranks: int, parameters: int | None) -> list[str]:
    """Return what a rank holds, by category: bytes per parameter, and bytes in all where their number is known."""
    moments, of = moments_of(config)
    states_away = config.zero.offload_optimizer.device == "cpu"
    widths = widths_of(config)
    moments += states_away and widths.compute == widths.master  # masters are then no longer the parameters themselves
    count = parameters or ranks
    cost = held([count], ranks=ranks, stage=config.zero.stage, widths=widths, moments=moments)
    places = {
        "parameters": (cost.parameters, config.zero.offload_param.device == "cpu"),
        "gradients": (cost.gradients, False),
        "optimizer states": (cost.optimizer, states_away),
    }
    lines = [f"A rank holds, at ZeRO stage {config.zero.stage} in {config.dtype}, {of}:"]
    for what, (size, is_away) in {**places, "together": (cost.total, False)}.items():
        whole = f"  {size / 1e9:12,.3f} GB" if parameters else ""
        lines.append(f"  {what:16}  {size / count:7.4g} bytes per parameter{whole}{', on the CPU' * is_away}")
    return lines


def message_lines(config: Config, ranks: int, pp: int) -> list[str]:
    """Return what a rank sends to those that hold other shards, in a step; and why it is more than two times all."""
    micros, stage = config.batch.accumulation, config.zero.stage
    of = f"the parameters of its stage, 1/{pp} of the model's" if pp > 1 else "the parameters"
    if ranks == 1:
        return [f"It sends nothing of {of}: there is one data-parallel rank."]
    times, least = (sent([ranks], ranks=ranks, stage=s, micro=micros) / (ranks - 1) for s in (stage, 1))
    batches = f"{micros} micro-batch{'es' * (micros > 1)}"
    lines = [f"It sends {times:g} x {ranks - 1}/{ranks} of {of}, in a step of {batches}; stage 1 sends {least:g}."]
    if stage >= 2 and micros > 1:
        lines.append(f"Each of the {batches} has its gradients summed by themselves: {micros} instead of 1.")
    if stage == 3:
        lines.append(f"Each gathers the parameters for its forward and for its backward: {2 * micros} instead of 1.")
    return lines


def moments_of(config: Config) -> tuple[int, str]:
    """Return how many numbers the optimizer holds of each parameter besides the master, and for which optimizer."""
    if config.optimizer is None:
        return 2, "for an optimizer with two moments, such as AdamW"
    if config.optimizer.type == "SGD":
        return int(config.optimizer.params["momentum"] > 0), "for SGD"
    of_torch = config.optimizer.type not in ("Adam", "AdamW")
    return 2, f"for {config.optimizer.type}" + ", as if it held two moments" * of_torch


def widths_of(config: Config) -> Widths:
    """Return the bytes of what the engine keeps and sends."""
    accumulate, reduce = config.data_types.grad_accum_dtype, config.communication_data_type
    return Widths.named(config.dtype, zero=config.zero.stage, accumulate=accumulate, reduce=reduce)
