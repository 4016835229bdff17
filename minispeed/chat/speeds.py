"""Measure what one rank does in a second, while all ranks of the machine do the same at the same time.

Each rate is that of lines which training runs: a Linear's three products, the fused attention, what lies between the
products of a block, the collectives of this rank's group. Ranks that share cores hold each other up at random, so what
counts is not how long one call took but how many went through in a window of time; of three windows, the middle one.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from minispeed.collective.world import World
from minispeed.model.attention import implementation
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT, describe
from minispeed.model.mask import Mask
from minispeed.model.rotary import rotate
from minispeed.plan.work import block
from minispeed.precision import DTYPES

WINDOWS = 3


class Sizes(NamedTuple):
    """What is measured with, for one kind of device.

    products   (tokens, inputs, outputs) of a Linear
    rows, tokens, heads, head_dim   of attention and of what lies between products
    long       bytes of a long array
    messages   bytes of a collective's buffer
    window     seconds of a window
    """

    products: tuple[tuple[int, int, int], ...]
    rows: int
    tokens: int
    heads: int
    head_dim: int
    long: int
    messages: tuple[int, ...]
    window: float


CPU = Sizes(
    products=((1024, 256, 768), (1024, 512, 512), (512, 512, 2048)),
    rows=8, tokens=256, heads=8, head_dim=32, long=2**25, messages=(2**12, 2**16, 2**20, 2**23), window=0.07,
)  # fmt: skip
CUDA = Sizes(
    products=((8192, 4096, 4096), (8192, 2048, 8192), (4096, 4096, 16384)),
    rows=8, tokens=2048, heads=16, head_dim=128, long=2**28, messages=(2**12, 2**16, 2**20, 2**26), window=0.1,
)  # fmt: skip
QUICK = Sizes(
    products=((64, 32, 32),),
    rows=1, tokens=16, heads=2, head_dim=16, long=2**16, messages=(2**8, 2**12), window=0.002,
)  # fmt: skip
TINY = GPTConfig(
    vocab_size=8, max_positions=8, num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, hidden_dim=8,
    norm="layernorm",
)  # fmt: skip


class Sample(NamedTuple):
    """A call of the group's: how many messages follow one another in it, of how many bytes together, and its time."""

    call: str
    messages: int
    bytes: float
    seconds: float


def measure(world: World, quick: bool, threads: int, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """Return this rank's rates, as `profiles.Rates` has them; 0 for a dtype that the device has no products in.

    quick    small sizes and short windows: figures that mean nothing, to see that all of it runs
    threads  that torch computes with; 0: as the launcher shares them out
    """
    if threads:
        torch.set_num_threads(threads)
    sizes = QUICK if quick else CUDA if world.device.type == "cuda" else CPU
    by_dtype = {"flops": products, "attention": attention, "between": between}
    tables = {
        name: {dtype: _supported(rate, world, sizes, DTYPES[dtype]) for dtype in dtypes}
        for name, rate in by_dtype.items()
    }
    return {
        **tables,
        "bandwidth": long_arrays(world, sizes),
        "overhead": overhead(world, sizes),
        "samples": collectives(world, sizes) if world.size > 1 else [],
        "host": host(world, sizes),
        "block": {dtype: block_seconds(world, sizes, DTYPES[dtype]) for dtype in dtypes if tables["flops"][dtype]},
        "threads": torch.get_num_threads(),
    }


def seconds_of(world: World, work: Callable[[], Any], window: float) -> float:
    """Return the seconds that a call takes while every rank makes it, over and over."""
    count, found = 1, 0.0
    work()
    while (found := _elapsed(world, work, count)) < window / 2 and count < 1 << 16:
        count = max(2 * count, int(count * window / max(found, 1e-9)) // 2)
    world.group.all_reduce(torch.zeros(1, device=world.device)).wait()  # all ranks begin together
    return statistics.median(_elapsed(world, work, count) for _ in range(WINDOWS)) / count


def products(world: World, sizes: Sizes, dtype: torch.dtype) -> float:
    """Return FLOPs a second of a Linear's products: forward, and both of the backward."""
    rates = []
    for n, inputs, outputs in sizes.products:
        x, w, g = (_drawn(world, shape, dtype) for shape in ((n, inputs), (outputs, inputs), (n, outputs)))
        seconds = seconds_of(world, lambda: (x @ w.T, g @ w, g.T @ x), sizes.window)  # noqa: B023 called at once
        rates.append(6 * n * inputs * outputs / seconds)
    return statistics.median(rates)


def attention(world: World, sizes: Sizes, dtype: torch.dtype) -> float:
    """Return FLOPs a second of the fused attention on rows of two documents: 12 for each pair of tokens and feature."""
    B, T, H, K = sizes.rows, sizes.tokens, sizes.heads, sizes.head_dim
    documents = _documents(world, sizes)
    mask, core = Mask(T, T, queries=documents, keys=documents), implementation("fused")
    q, k, v = (_drawn(world, (B, H, T, K), dtype).requires_grad_() for _ in range(3))
    g = _drawn(world, (B, H, T, K), dtype)
    seconds = seconds_of(world, lambda: torch.autograd.grad(core(q, k, v, mask), (q, k, v), g), sizes.window)
    return 12 * B * H * T * T * K / seconds


def between(world: World, sizes: Sizes, dtype: torch.dtype) -> float:
    """Return bytes a second of what lies between a block's products: norm, sum, gate, rotary turns; both ways.

    The bytes are those of `plan.work`: 11 D, 14 F and 20 times each turned width, with D = H K and F = 3 D.
    """
    B, T, H, K = sizes.rows, sizes.tokens, sizes.heads, sizes.head_dim
    D = H * K
    x, gate, up, q, k = (_drawn(world, (B, T, width), dtype).requires_grad_() for width in (D, 3 * D, 3 * D, D, D))
    angles = torch.arange(T, device=world.device)[None, None, :, None] / torch.arange(
        1, K // 2 + 1, device=world.device
    )
    turns = angles.cos().to(dtype), angles.sin().to(dtype)
    norm = torch.nn.LayerNorm(D, device=world.device, dtype=dtype)
    gradients = tuple(_drawn(world, shape, dtype) for shape in ((B, T, D), (B, T, 3 * D), (B, H, T, K), (B, H, T, K)))

    def work() -> None:
        heads = (part.view(B, T, H, K).transpose(1, 2) for part in (q, k))
        out = (norm(x) + x, F.silu(gate) * up, *(rotate(part, turns) for part in heads))
        torch.autograd.grad(out, (x, gate, up, q, k), gradients)

    return B * T * D * (11 + 3 * 14 + 2 * 20) * dtype.itemsize / seconds_of(world, work, sizes.window)


def long_arrays(world: World, sizes: Sizes) -> float:
    """Return bytes a second of a sum of two long arrays into a third, fp32."""
    x, y, out = (torch.ones(sizes.long // 4, device=world.device) for _ in range(3))
    return 3 * sizes.long / seconds_of(world, lambda: torch.add(x, y, out=out), sizes.window)


def overhead(world: World, sizes: Sizes) -> float:
    """Return the seconds of an operation, of those of a block that has nothing to compute."""
    count = block(TINY, rows=1, tokens=8, width=4)
    seconds = _seconds_of_block(world, TINY, rows=1, tokens=8, dtype=torch.float32, window=sizes.window)
    return seconds / (count.forward.operations + count.backward.operations)


def host(world: World, sizes: Sizes) -> tuple[float, float]:
    """Return the seconds of the shortest copy to the host's memory, and bytes a second of a long one."""
    there = torch.ones(sizes.long // 4, device=world.device)
    here = torch.ones(sizes.long // 4, pin_memory=world.device.type == "cuda")
    short = seconds_of(world, lambda: here[:1].copy_(there[:1]), sizes.window)
    return short, sizes.long / seconds_of(world, lambda: here.copy_(there), sizes.window)


def collectives(world: World, sizes: Sizes) -> list[Sample]:
    """Return the times of the calls that training makes of its group, for buffers of each size.

    A ring's steps are its messages: an all-reduce has 2 (N - 1), of 2 (N - 1)/N of the buffer together.
    """
    group, N, samples = world.group, world.size, []
    right, left = (world.rank + 1) % N, (world.rank - 1) % N
    for size in sizes.messages:
        n = -(-size // (4 * N)) * N
        x, out, mine = (torch.zeros(count, device=world.device) for count in (n, n, n // N))
        calls: Mapping[str, tuple[int, float, Callable[[], Any]]] = {
            "all_reduce": (2 * (N - 1), 2 * (N - 1) / N, lambda: group.all_reduce(x)),
            "reduce_scatter": (N - 1, (N - 1) / N, lambda: group.reduce_scatter(mine, x)),
            "all_gather": (N - 1, (N - 1) / N, lambda: group.all_gather(out, mine)),
            "exchange": (1, 1, lambda: group.exchange([(x, right)], [(out, left)])),
        }
        for name, (messages, share, call) in calls.items():
            samples.append(Sample(name, messages, share * n * 4, _seconds_of_call(world, call, sizes.window)))
    return samples


def block_seconds(world: World, sizes: Sizes, dtype: torch.dtype) -> float:
    """Return the seconds of a real block, forward and backward: what the rates together must predict."""
    return _seconds_of_block(world, check_model(sizes), sizes.rows, sizes.tokens, dtype, sizes.window)


def check_model(sizes: Sizes) -> GPTConfig:
    """Return the model whose block checks the rates; half as wide as what they are measured with."""
    D = max(sizes.heads // 2, 1) * sizes.head_dim
    return GPTConfig(
        vocab_size=8, max_positions=sizes.tokens, num_layers=1, model_dim=D, num_heads=D // sizes.head_dim,
        num_kv_heads=D // sizes.head_dim, head_dim=sizes.head_dim, hidden_dim=3 * D, norm="layernorm",
    )  # fmt: skip


def _seconds_of_block(
    world: World, config: GPTConfig, rows: int, tokens: int, dtype: torch.dtype, window: float
) -> float:
    model = GPT(config).to(world.device, dtype)
    inputs = torch.zeros(rows, tokens, dtype=torch.long, device=world.device)
    documents = (torch.arange(tokens, device=world.device) >= tokens // 2).long().expand(rows, tokens)
    known = describe(
        config, dtype, inputs, positions=None, documents=documents, tasks=None, cache=None, drops=(None, None)
    )
    layer = model.blocks[0]
    x = _drawn(world, (rows, tokens, config.model_dim), dtype).requires_grad_()
    g, wanted = torch.ones_like(x), (x, *layer.parameters())
    return seconds_of(world, lambda: torch.autograd.grad(layer(x, known), wanted, g), window)


def _seconds_of_call(world: World, call: Callable[[], Any], window: float) -> float:
    """Return a call's seconds; every rank makes it as often, a number that all agree on."""
    call().wait()
    once = torch.tensor([_elapsed(world, lambda: call().wait(), 2) / 2], device=world.device)
    world.group.all_reduce(once, op="max").wait()
    count = max(1, min(200, int(window / once.item())))
    return statistics.median(_elapsed(world, lambda: call().wait(), count) for _ in range(WINDOWS)) / count


def _elapsed(world: World, work: Callable[[], Any], count: int) -> float:
    _finish(world)
    start = time.perf_counter()
    for _ in range(count):
        work()
    _finish(world)
    return time.perf_counter() - start


def _finish(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _drawn(world: World, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return numbers as large as features are; zeros would be faster than anything."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(world.device, dtype)


def _documents(world: World, sizes: Sizes) -> torch.Tensor:
    halves = torch.arange(sizes.tokens, device=world.device) >= sizes.tokens // 2
    return halves.long().expand(sizes.rows, sizes.tokens)


def _supported(
    rate: Callable[[World, Sizes, torch.dtype], float], world: World, sizes: Sizes, dtype: torch.dtype
) -> float:
    """Return a rate, 0 where the device has no such operation; every rank then has none."""
    try:
        return rate(world, sizes, dtype)
    except RuntimeError:
        return 0.0
