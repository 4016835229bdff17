"""The laws of chapter 00's exercise: every prediction is compared with what a real model has, keeps and holds."""

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from examiner import law, same
from hypothesis import strategies as st
from tracing import Kept, storage_bytes

from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.optim import AdamW

SHAPE = dict(  # two heads or more, and two tokens: where there is one, torch need not copy what it transposes
    layers=st.integers(1, 3),
    model_dim=st.integers(1, 9),
    key_heads=st.integers(1, 2),
    shares=st.integers(2, 3),
    head_dim=st.sampled_from([4, 6, 8]),
    hidden=st.integers(1, 9),
    vocabulary=st.integers(1, 20),
)
TOKENS = dict(rows=st.integers(1, 3), tokens=st.integers(2, 5))


def config_of(shape: dict[str, int]) -> GPTConfig:
    """Return the chapter's kind of model in a drawn shape."""
    return preset(
        "nano",
        vocab_size=shape["vocabulary"],
        num_layers=shape["layers"],
        model_dim=shape["model_dim"],
        num_heads=shape["key_heads"] * shape["shares"],
        num_kv_heads=shape["key_heads"],
        head_dim=shape["head_dim"],
        hidden_dim=shape["hidden"],
    )


@lru_cache(maxsize=4096)
def kept_bytes(config: GPTConfig, rows: int, tokens: int) -> int:
    """Return what autograd keeps of a real forward."""
    model = GPT(config)
    kept, given = Kept(model), torch.zeros(rows, tokens, dtype=torch.int64)
    with kept.watching():
        losses = model(given, given)
    counted = kept.bytes
    del losses
    return counted


@lru_cache(maxsize=4096)
def states_of(config: GPTConfig) -> dict[str, int]:
    """Return what a real model holds after a step, the optimizer's counters left out."""
    model = GPT(config)
    optimizer, given = AdamW(model.parameters()), torch.zeros(1, 1, dtype=torch.int64)
    model(given, given).sum().backward()
    optimizer.step()
    moments: list[Any] = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    return {
        "parameters": storage_bytes(model.parameters()),
        "gradients": storage_bytes(p.grad for p in model.parameters()),
        "optimizer": storage_bytes(moments),
    }


@law(
    "count_parameters counts what the model really has",
    of="count_parameters",
    hints=(
        "go through the docstring from the front, and write down one product for every matrix",
        "a matrix from A to B has A times B numbers; a block has two norms, qkv, out, and three matrices in its MLP",
        "V D + L (4 D + D (H + 2 G) K + H K D + 3 D F) + 2 D",
    ),
    **SHAPE,
)
def test_parameters(code: ModuleType, **shape: int) -> None:
    config = config_of(shape)
    model = GPT(config, hollow_on=torch.device("meta"))  # the shapes alone, without memory
    same(code.count_parameters(config), sum(p.numel() for p in model.parameters()), "parameters")


@law(
    "bytes_of_states says what lies in memory after a real step",
    of="bytes_of_states",
    hints=(
        "how many numbers does each of the three have for every parameter?",
        "a parameter has one gradient, and two moments of Adam's; each of these numbers has 4 bytes",
        "parameters 4 P, gradients 4 P, optimizer 8 P, with P = count_parameters(config)",
    ),
    **SHAPE,
)
def test_states(code: ModuleType, **shape: int) -> None:
    config = config_of(shape)
    found = code.bytes_of_states(config)
    for name, expected in states_of(config).items():
        same(found.get(name), expected, f"bytes of the {name}")


@law(
    "bytes_kept_by_block says what one block more makes autograd keep",
    of="bytes_kept_by_block",
    hints=(
        "every row of the lesson's second table is so many numbers for each token: add the rows up",
        "heads: queries are H K numbers, keys and values G K each; the log of the sums is H numbers",
        "4 tokens (2 (D + 2) + 2 D + (H + 2 G) K + (H + G) K + H + 2 H K + 4 F)",
    ),
    **SHAPE,
    **TOKENS,
)
def test_block(code: ModuleType, rows: int, tokens: int, **shape: int) -> None:
    more = kept_bytes(config_of({**shape, "layers": shape["layers"] + 1}), rows, tokens)
    expected = more - kept_bytes(config_of(shape), rows, tokens)
    same(code.bytes_kept_by_block(config_of(shape), rows * tokens), expected, "bytes kept")


@law(
    "rows_that_fit fit, and one row more does not",
    of="rows_that_fit",
    hints=(
        "first take away from the budget what is there whatever the number of rows",
        "what is left is shared out in equal parts: the bytes that one row of `tokens` tokens keeps, in all L blocks "
        "and beside them",
        "max(0, (budget - parameters - optimizer) // (L * bytes_kept_by_block(config, tokens) "
        "+ sum(bytes_kept_beside(config, tokens).values())))",
    ),
    budget=st.integers(0, 200_000),
    tokens=st.integers(2, 5),
    **SHAPE,
)
def test_rows(code: ModuleType, budget: int, tokens: int, **shape: int) -> None:
    config = config_of(shape)
    held = states_of(config)
    left, row = budget - held["parameters"] - held["optimizer"], kept_bytes(config, 1, tokens)
    same(code.rows_that_fit(config, tokens, budget), max(0, left // row), "rows")
