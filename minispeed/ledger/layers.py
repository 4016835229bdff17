"""Write the layers of a GPT down on a tape: a block, the last norm.

As `model/gpt.py`, `model/attention.py`, `tensor/layers.py`, `sequence/` and `model/lora.py` run them on a CPU; what
several operations of torch's do, and nobody else sees, is one here, with what it needs meanwhile.

Letters: b rows, s tokens of a rank, n = b s; h model, a heads and g key/value heads of a rank, k head dim, f hidden
features of a rank, t ranks of tensor parallelism, p ranks that share a row; e bytes of an element, w in fp32 or wider.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from minispeed.ledger.states import BYTES
from minispeed.ledger.tape import Played, Tape, Value
from minispeed.model.config import GPTConfig
from minispeed.model.shapes import parameters

TILE, RING_TILE = 128, 512  # queries and keys whose scores exist at once, of tiled and of ring attention


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a layer runs on a rank.

    b, s         rows of a micro-batch, and tokens of each that are here
    dtype        "bf16", "fp16", "fp32" or "fp64"
    t, is_cut    ranks of tensor parallelism; whether the stream between cut layers is cut by tokens
    p, sequence  ranks that share a row, and how: "ulysses" or "ring"
    recomputed   "none", "attention" or "all"
    lora_rank, lora_targets   as `minispeed.model.shapes.parameters`
    reaches      whether the gradient of what the layer is given is asked for
    put_off, holds      as `Tape`
    """

    config: GPTConfig
    b: int
    s: int
    dtype: str = "bf16"
    t: int = 1
    is_cut: bool = False
    p: int = 1
    sequence: str = "ulysses"
    recomputed: str = "none"
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    reaches: bool = True
    put_off: bool = False
    holds: bool = False

    @property
    def e(self) -> int:
        """Bytes of an element."""
        return BYTES[self.dtype]

    @property
    def w(self) -> int:
        """Bytes of an element in fp32 or wider."""
        return max(self.e, 4)

    @property
    def stream(self) -> int:
        """Tokens of the stream between cut layers."""
        return self.b * self.s // (self.t if self.is_cut else 1)


@lru_cache(maxsize=256)
def adapted(config: GPTConfig, rank: int, targets: tuple[str, ...]) -> frozenset[str]:
    """Return the Linears of a block that have adapters: "attention.qkv"."""
    names = [shape.name for shape in parameters(config, lora_rank=rank, lora_targets=targets)]
    found = (name.removesuffix(".lora.a.weight") for name in names if name.endswith(".lora.a.weight"))
    return frozenset(name.removeprefix("blocks.0.") for name in found)


@lru_cache(maxsize=8192)
def block(of: Setting) -> Played:
    """Play a block, from its input to its output."""
    tape = _Tape(of)
    x = tape.given(of.stream * of.config.model_dim * of.e, has_gradient=of.reaches)
    x_ = tape.add(x, tape.drop(tape.attention(tape.norm(x))))
    tape.add(x_, tape.drop(tape.mlp(tape.norm(x_))))
    return tape.play([x])


@lru_cache(maxsize=8192)
def final_norm(of: Setting) -> Played:
    """Play the last norm, up to the features that the head reads."""
    tape = _Tape(of)
    x = tape.given(of.stream * of.config.model_dim * of.e)
    tape.whole(tape.norm(x))
    return tape.play([x])


class _Tape(Tape):
    """A tape that knows the parts of a block."""

    def __init__(self, of: Setting) -> None:
        super().__init__(put_off=of.put_off, holds=of.holds)
        self.of, config = of, of.config
        self.n = of.b * of.s
        self.heads, self.kv_heads = config.num_heads // of.t, config.num_kv_heads // of.t
        self.hidden = config.hidden_dim // of.t
        self.trains = not of.lora_rank

    def add(self, x: Value, y: Value) -> Value:
        """Add two values; the gradient of the sum is that of both."""
        return self.run([x, y], x.size, shares=True)

    def drop(self, x: Value) -> Value:
        """Drop out of what is added to the stream: which, is a byte for each element, drawn in int64."""
        elements = x.size // self.of.e
        return self.run([x], x.size, extra=elements, forward=6 * elements) if self.of.config.dropout else x

    def norm(self, x: Value, features: int | None = None) -> Value:
        """Normalise the last features, all of the stream unless told."""
        of, e, w = self.of, self.of.e, self.of.w
        D = features or of.config.model_dim
        rows = x.size // e // D
        if of.config.norm == "layernorm":
            weight = 2 * D * e * self.trains
            return self.run([x], x.size, keeps=[x], extra=2 * rows * e, weight=weight)
        wide = x.size // e * w
        own = wide * (e < w) + wide * self.trains + rows * w  # wide inputs, the same over the rms, 1 / rms
        return self.run(
            [x],
            x.size,
            keeps=[x] if e == w else [],
            extra=own,
            weight=D * e * self.trains,
            forward=wide * (e < w) + wide,
            backward=(4 + (not self.trains)) * wide - 2 * x.size,
        )

    def linear(self, x: Value, inputs: int, outputs: int, name: str, *, bias: bool, is_row: bool = False) -> Value:
        """Apply a Linear, and the adapter beside it; the half of that which tp leaves whole is not put off."""
        of, rows = self.of, x.size // self.of.e // inputs
        weight = (inputs * outputs + bias * outputs) * of.e * self.trains
        y = self.run([x], rows * outputs * of.e, keeps=[x] if weight else [], weight=weight, linear=True)
        if name not in adapted(of.config, of.lora_rank, of.lora_targets):
            return y
        small = rows * of.lora_rank * of.e
        a = self.run([x], small, keeps=[x], weight=inputs * of.lora_rank * of.e, linear=of.t == 1 or is_row)
        a = self.run([a], small)
        b = self.run([a], y.size, keeps=[a], weight=outputs * of.lora_rank * of.e, linear=of.t == 1 or not is_row)
        return self.add(y, b)

    # ---- into and out of what tensor parallelism cuts

    def enter(self, x: Value) -> Value:
        """Hand the stream to layers of which every rank has a part."""
        of = self.of
        if of.t == 1:
            return x
        if not of.is_cut:
            return self.run([x], x.size, view=x)
        whole = x.size * of.t
        return self.run([x], whole, forward=whole, backward=2 * whole)

    def leave(self, y: Value) -> Value:
        """Sum what the ranks' parts made, and put it into the stream."""
        of = self.of
        if of.t == 1:
            return y
        if not of.is_cut:
            return self.run([y], y.size, shares=True)
        return self.run([y], y.size // of.t, forward=y.size, backward=y.size)

    def whole(self, x: Value) -> Value:
        """Let every rank have all of the stream."""
        of = self.of
        return self.run([x], x.size * of.t, forward=x.size * of.t) if of.t > 1 and of.is_cut else x

    def row(self, x: Value, inputs: int, outputs: int, name: str, *, bias: bool) -> Value:
        """Apply a Linear that is cut by its input features."""
        of = self.of
        if of.t == 1:
            return self.linear(x, inputs, outputs, name, bias=bias)
        y = self.leave(self.linear(x, inputs, outputs, name, bias=False, is_row=True))
        return self.run([y], y.size, shares=True, weight=outputs * of.e * self.trains) if bias else y

    # ---- the parts of a block

    def mlp(self, x: Value) -> Value:
        """Run the MLP on what the norm made."""
        config, D = self.of.config, self.of.config.model_dim
        x = self.enter(x)
        if config.mlp == "gelu":
            up = self.linear(x, D, self.hidden, "mlp.up", bias=config.mlp_bias)
            h = self.run([up], up.size, keeps=[up])
        else:
            gate = self.linear(x, D, self.hidden, "mlp.gate", bias=config.mlp_bias)
            gate = self.run([gate], gate.size, keeps=[gate])
            up = self.linear(x, D, self.hidden, "mlp.up", bias=config.mlp_bias)
            h = self.run([gate, up], up.size, keeps=[gate, up])
        return self.row(h, self.hidden, D, "mlp.down", bias=config.mlp_bias)

    def attention(self, x: Value) -> Value:
        """Run the attention on what the norm made."""
        of, config, K = self.of, self.of.config, self.of.config.head_dim
        Q, KV = self.heads * K, self.kv_heads * K
        fused = self.linear(self.enter(x), config.model_dim, Q + 2 * KV, "attention.qkv", bias=config.qkv_bias)
        sizes = [self.n * Q * of.e, self.n * KV * of.e, self.n * KV * of.e]
        self.run([fused], sizes, view=fused)
        q, k, v = self.ops[-1].outs
        if config.qk_norm:
            q, k = self.norm(q, K), self.norm(k, K)
        if config.positions == "rotary":
            q, k = (self.run([x], x.size, forward=x.size, backward=x.size) for x in (q, k))
        y = self.speaking(q, k, v)
        out = self.run([y], y.size) if self.is_copied(y, fused) else y
        made = self.row(out, Q, config.model_dim, "attention.out", bias=config.out_bias)
        self.lives(fused, q, k, y)
        return made

    def is_copied(self, y: Value, fused: Value) -> bool:
        """Whether the core's output lies head by head, and `out` must have it copied token by token."""
        of = self.of
        is_ring = of.p > 1 and of.sequence == "ring"
        lies_like_q = is_ring or (of.p == 1 and of.config.attention != "reference" and of.recomputed != "attention")
        return not (lies_like_q and of.config.positions == "learned" and not of.config.qk_norm)

    def speaking(self, q: Value, k: Value, v: Value) -> Value:
        """Run attention's core on the tokens here, or with ranks that share the rows."""
        of = self.of
        if of.p > 1 and of.sequence == "ring":
            return self.ring(q, k, v)
        if of.p > 1:
            q, k, v = (self.change_places(x) for x in (q, k, v))
        y = self.again(q, k, v) if of.recomputed == "attention" else self.core(q, k, v)
        return self.change_places(y) if of.p > 1 else y

    def change_places(self, x: Value) -> Value:
        """Exchange tokens and heads."""
        return self.run([x], x.size, forward=2 * x.size, backward=2 * x.size)

    def core(self, q: Value, k: Value, v: Value) -> Value:
        """Attend."""
        return {"reference": self.reference, "tiled": self.tiled, "fused": self.fused}[self.of.config.attention](
            q, k, v
        )

    @property
    def pairs(self) -> int:
        """Queries times keys of all heads here."""
        of = self.of
        return of.b * (self.heads // of.p if of.sequence == "ulysses" else self.heads) * (of.s * of.p) ** 2

    def fused(self, q: Value, k: Value, v: Value) -> Value:
        """Attend by torch's kernel."""
        log_sums = q.size // self.of.e // self.of.config.head_dim * self.of.w
        return self.run([q, k, v], q.size, keeps=[q, k, v], keeps_out=True, extra=log_sums)

    def tiled(self, q: Value, k: Value, v: Value) -> Value:
        """Attend tile by tile."""
        of, e, w = self.of, self.of.e, self.of.w
        log_sums = q.size // e // of.config.head_dim * w
        whole = of.s * of.p
        tile = of.b * (self.heads // of.p) * min(TILE, whole) ** 2 * w
        wide = (2 * q.size + k.size + v.size) // e * w * (e < w)  # gradients, that of the output among them
        return self.run(
            [q, k, v],
            q.size,
            keeps=[q, k, v],
            keeps_out=True,
            extra=log_sums,
            forward=3 * tile + q.size // e * w,
            backward=wide + log_sums + (5 + (whole > TILE)) * tile,
        )

    def ring(self, q: Value, k: Value, v: Value) -> Value:
        """Attend while keys and values travel."""
        of, e, w = self.of, self.of.e, self.of.w
        log_sums = q.size // e // of.config.head_dim * w
        tile = of.b * self.heads * min(RING_TILE, of.s // 2) ** 2 * w
        kv = k.size + v.size  # beside mine, those of the next rank are on their way; so are the gradients
        cast = (2 * q.size + 2 * kv) // e * w - q.size - kv
        return self.run(
            [q, k, v],
            q.size,
            keeps=[q, k, v],
            keeps_out=True,
            extra=log_sums,
            forward=3 * tile + 2 * q.size // e * w + 2 * kv,
            backward=2 * kv + cast * (e < w) + 5 * tile,
        )

    def reference(self, q: Value, k: Value, v: Value) -> Value:
        """Attend by the formula."""
        scores_size = self.pairs * self.of.e
        shares = self.heads // self.kv_heads
        k, v = (self.run([x], x.size * shares) if shares > 1 else x for x in (k, v))
        q = self.run([q], q.size)
        if shares == 1:
            k, v = (self.run([x], x.size) for x in (k, v))
        scores = self.run([q, k], scores_size, keeps=[q, k])
        weights = self.run([self.run([scores], scores_size, shares=True)], scores_size, keeps_out=True)
        self.lives(scores)
        if self.of.config.attention_dropout:
            weights = self.run([weights], scores_size, extra=self.pairs, forward=6 * self.pairs)
        return self.run([weights, v], q.size, keeps=[weights, v])

    def again(self, q: Value, k: Value, v: Value) -> Value:
        """Keep what the core is given, and run it again in the backward."""
        inner = _Tape(replace(self.of, holds=False))
        given = [inner.given(x.size) for x in (q, k, v)]
        inner.core(*given)
        played = inner.play(given)
        kept = {storage for op in inner.ops for storage in op.kept}
        twice = sum(x.size for x in given if x.storage in kept) + 2 * q.size + k.size + v.size
        more = max(played.forward, played.backward) - twice
        return self.run([q, k, v], q.size, keeps=[q, k, v], forward=played.forward, backward=max(0, more))
