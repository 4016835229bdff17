"""Describe a run by what its memory, messages and time follow from: the model, the rows of a step, and the layout.

A `Job` is what a plan chooses among and what the closed forms are functions of. It is data: nothing is built.
"""

from dataclasses import dataclass
from functools import cached_property

from minispeed.axes import Layout
from minispeed.errors import UserError
from minispeed.ledger.states import BYTES, Widths
from minispeed.mesh import Mesh
from minispeed.model.config import GPTConfig

EVERY = {"none": 0, "attention": 0, "all": 1}  # blocks from one that is recomputed to the next; 0: none is


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run of a GPT, one step of which is like every other.

    devices       ranks: dp x pp x sp x tp; dp is what the layout leaves
    rows, tokens  of a step, all replicas together; of each row, T
    micro_batch   rows that go through a replica at once
    zero          stage
    dtype         of parameters and products: "fp32", "bf16", "fp16" or "fp64"
    accumulate    of gradients added up; None: the masters', and where a replica has one micro-batch the compute dtype
    supervised    share of the tokens whose loss is asked for, 0 to 1
    recompute     "none", "attention", "all", or every so many blocks
    prefetch, persistence, overlap   as `minispeed.zero.sharded.ShardedModel`
    lora_rank, lora_targets   as `minispeed.model.shapes.parameters`
    """

    model: GPTConfig
    devices: int
    rows: int
    tokens: int
    micro_batch: int
    layout: Layout = Layout()
    zero: int = 0
    dtype: str = "bf16"
    accumulate: str | None = None
    supervised: float = 1.0
    recompute: str = "none"
    offload_optimizer: bool = False
    offload_param: bool = False
    prefetch: int = 0
    persistence: int = 0
    overlap: bool = True
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in BYTES:
            raise UserError(f"dtype is {self.dtype!r}, not one of {', '.join(BYTES)}", fix="dtype='bf16'")
        if self.recompute not in EVERY and not self.recompute.isdecimal():
            raise UserError(f"cannot recompute {self.recompute!r}", fix="none, all, attention, or a number of blocks")
        if self.rows % self.mesh.dp:
            what = f"{self.rows} rows do not divide over {self.mesh.dp} replicas"
            raise UserError(what, fix=f"{-(-self.rows // self.mesh.dp) * self.mesh.dp} rows")
        if self.layout.pp > 1 and self.replica_rows % self.micro_batch:
            what = f"a pipeline's micro-batches are of one size, and {self.micro_batch} does not divide"
            raise UserError(f"{what} {self.replica_rows} rows", fix="a divisor")

    @cached_property
    def mesh(self) -> Mesh:
        """Where each rank stands.  Raises UserError if the devices do not divide"""
        return self.layout.mesh(self.devices)

    @property
    def shards(self) -> int:
        """N: the ranks that hold other shards of the same parameters, along dp and sp."""
        return self.mesh.dp * self.layout.sp

    @property
    def replica_rows(self) -> int:
        """Rows of a step that one replica has."""
        return self.rows // self.mesh.dp

    @property
    def micros(self) -> int:
        """Micro-batches of a step, of one replica; the last may be shorter."""
        return -(-self.replica_rows // self.micro_batch)

    @cached_property
    def widths(self) -> Widths:
        """Bytes of an element, by what it is kept for."""
        accumulate = self.accumulate or (self.dtype if self.micros == 1 else None)
        return Widths.named(self.dtype, zero=self.zero, accumulate=accumulate)

    def is_recomputed(self, block: int) -> bool:
        """Whether a block as a whole runs its forward again."""
        every = EVERY[self.recompute] if self.recompute in EVERY else int(self.recompute)
        return every > 0 and block % every == 0
