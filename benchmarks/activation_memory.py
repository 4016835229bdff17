"""How many bytes does a transformer block keep for its backward, on each rank of tensor parallelism?

    python benchmarks/activation_memory.py              shapes of a GPT-2 and a Llama on 1, 2 and 4 ranks
    python benchmarks/activation_memory.py --quick      small shapes; nothing is written

The closed form, operation by operation, is `minispeed.ledger.activations`.

Counted: each storage that autograd saves, once, parameters left out; in a model of two blocks less in one of one. On a
CPU: other devices have other kernels. b and the heads of a rank are two or more: of one, matmul copies nothing.

Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198), of 16 bits and f = 4 h: s b h (34 + 5 a s/h) bytes, section
4.1; 10 + 24/t + 5 a s/(h t) over t ranks, all of it over t where tokens are cut, 4.2; without the term of pairs where
attention is recomputed, 5, or a kernel keeps none. Where we differ, a second table says by how much and why: there is
no dropout here (masks of 1 byte, attention's weights after it); norms keep statistics, the kernel the log of its sums;
where tokens are cut, the paper keeps s/t of what is gathered, and gathers again; a recomputed block's input is cut too.

Letters, the paper's: b rows, s tokens, h model, a heads, t ranks; and g key/value heads, k head dim, f hidden.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from report import report, table

from minispeed.collective.group import Group
from minispeed.collective.threads import run_threads
from minispeed.ledger.activations import Case, closed_form
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.model.recompute import recompute
from minispeed.precision import DTYPES
from minispeed.tensor.parallel import tensor_parallel
from minispeed.tensor.plan import gpt_plan

LAYOUTS = ((1, False), (2, False), (2, True), (4, False), (4, True))  # t, is the stream cut by tokens
TERMS = (
    "no dropout masks",
    "no weights after dropout",
    "statistics of norms",
    "log of sums",
    "inputs kept gathered",
    "block's input cut",
)
KEEPING = (("reference", "none"), ("fused", "none"), ("reference", "attention"), ("reference", "all"))


def paper(case: Case) -> int | None:
    """Return what Korthikanti et al. say, bytes on each rank; None for blocks of which they do not speak."""
    config, b, s, t = case.config, case.b, case.s, case.t
    h = config.model_dim
    is_theirs = (config.norm, config.mlp, config.hidden_dim, case.dtype) == ("layernorm", "gelu", 4 * h, "bf16")
    if not is_theirs or config.positions == "rotary" or config.num_heads * config.head_dim != h:
        return None
    if case.recomputed == "all":
        return 2 * s * b * h
    pairs = 5 * b * config.num_heads * s * s // t if _keeps_pairs(case) else 0
    return s * b * h * 34 // t + pairs if case.is_cut else s * b * h * 10 + s * b * h * 24 // t + pairs


def beyond_paper(case: Case) -> dict[str, int]:
    """Return the terms by which a block of the paper's kind keeps more or less than the paper says, bytes."""
    b, s, h, t = case.b, case.s, case.config.model_dim, case.t
    tokens = b * s // (t if case.is_cut else 1)
    if case.recomputed == "all":
        return {"block's input cut": 2 * h * (tokens - b * s)}
    pairs = b * case.config.num_heads * s * s // t
    is_kernel = not _keeps_pairs(case) and case.recomputed == "none"
    return {
        "no dropout masks": -2 * tokens * h - pairs * _keeps_pairs(case),
        "no weights after dropout": -2 * pairs * _keeps_pairs(case),
        "statistics of norms": 8 * tokens,
        "log of sums": is_kernel * 4 * b * s * case.config.num_heads // t,
        "inputs kept gathered": 4 * h * (b * s - tokens),
    }


def _keeps_pairs(case: Case) -> bool:
    """Whether a number for each pair of tokens is kept."""
    return case.recomputed == "none" and case.config.attention == "reference"


def count(case: Case) -> list[int]:
    """Return the bytes that one block more makes each rank keep, counted."""

    def on_rank(group: Group) -> int:
        return saved_bytes(case, 2, group) - saved_bytes(case, 1, group)

    return run_threads(on_rank, case.t)


def saved_bytes(case: Case, layers: int, group: Group) -> int:
    """Return the bytes of the storages, but for parameters, that a model's forward saves for its backward."""
    config = replace(case.config, num_layers=layers)
    model = GPT(config).to(DTYPES[case.dtype])
    tensor_parallel(model, gpt_plan(config), group, sequence_parallel=case.is_cut)
    recompute(model, case.recomputed)
    tokens = torch.arange(case.b * case.s).view(case.b, case.s) % config.vocab_size
    saved: list[Tensor] = []  # kept until all are counted, so that no memory is used twice

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(tokens, tokens)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in saved}
    return sum(size for storage, size in sizes.items() if storage not in parameters)


def cases(h: int, s: int) -> Iterator[tuple[str, Case]]:
    """Yield the blocks of the table with the name of their family: of width h, on rows of s tokens."""
    shape = dict(vocab_size=512, max_positions=s, num_layers=1, model_dim=h, num_heads=12, head_dim=h // 12)
    families = {
        "GPT-2": preset("gpt2", **shape, num_kv_heads=12, hidden_dim=4 * h),
        "Llama": preset("llama-3.2-1b", **shape, num_kv_heads=4, hidden_dim=8 * h // 3),
    }
    for family, config in families.items():
        for dtype, layouts in (("bf16", LAYOUTS), ("fp32", LAYOUTS[:1])):
            for t, is_cut in layouts:
                for attention, recomputed in KEEPING:
                    own = replace(config, attention=attention)
                    yield family, Case(config=own, b=2, s=s, dtype=dtype, t=t, is_cut=is_cut, recomputed=recomputed)


def line(family: str, case: Case) -> dict[str, object]:
    """Compare paper, closed form and count."""
    counted, says = count(case), sum(closed_form(case).values())
    row: dict[str, object] = {"block": family, "dtype": case.dtype, "attention": case.config.attention}
    row |= {"recomputed": case.recomputed, "ranks": case.t, "stream": "cut by tokens" if case.is_cut else "whole"}
    row |= {"paper": paper(case), "closed form": says, "counted": max(counted)}
    return row | {"difference": max(abs(one - says) for one in counted)}


def explained(row: dict[str, object], case: Case) -> dict[str, object]:
    """Lead from the paper's bytes to the counted ones, term by term."""
    names = ("attention", "recomputed", "ranks", "stream", "paper")
    terms = dict.fromkeys(TERMS, 0) | beyond_paper(case)
    unexplained = row["counted"] - row["paper"] - sum(terms.values())
    return {name: row[name] for name in names} | terms | {"counted": row["counted"], "unexplained": unexplained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes; nothing is written")
    is_quick = parser.parse_args().quick
    h, s = (48, 16) if is_quick else (768, 512)
    rows = [(line(family, case), case) for family, case in cases(h, s)]
    theirs = [explained(row, case) for row, case in rows if row["paper"] is not None]
    for name, lines in (("activation_memory", [row for row, _ in rows]), ("activation_memory_paper", theirs)):
        print(table(lines)) if is_quick else report(name, lines, b=2, s=s, h=h, a=12)


if __name__ == "__main__":
    main()
