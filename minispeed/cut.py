"""Cut a model as a layout says: width, rows, depth; and keep of it what this rank holds.

Every rank builds the whole model, with the values that every other has too, and cuts it alike: so a cut model is by
construction a cut of the whole one. What comes out is a list of pieces, one for each pipeline stage on this rank.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from minispeed.axes import Layout
from minispeed.collective.group import Group
from minispeed.collective.numbers import everyones
from minispeed.errors import UserError
from minispeed.model.chunk import Chunk, layer_costs
from minispeed.model.gpt import GPT
from minispeed.parts import Lines, Logical
from minispeed.pipeline.partition import partition
from minispeed.placement import WHOLE, Shard, Slice, counts
from minispeed.sequence.cut import SequenceCut, cut_sequence
from minispeed.tensor.parallel import tensor_parallel
from minispeed.tensor.plan import Plan, gpt_plan


class Link(NamedTuple):
    """Neighbouring layers of a chain.

    module  (what came from the link before, tokens, labels, ...) -> what goes on, a tuple of tensors
    names   by the name in it, what the model calls each of its parameters
    copies  the names in it of those that are another link's too, which counts them
    """

    module: nn.Module
    names: Mapping[str, str]
    copies: Collection[str]


class Chain(Protocol):
    """A model as layers one after the other, which may be cut between any two of them."""

    @property
    def costs(self) -> Sequence[int]:
        """Return what each layer costs, in any unit: of stages the dearest is to be as cheap as can be."""

    def link(self, first: int, last: int) -> Link:
        """Return layers first .. last - 1, which may share modules with the model."""


class GPTChain:
    """A GPT's embedding, blocks, and norm with head."""

    def __init__(self, model: GPT) -> None:
        """Count the parameters, before anything is cut."""
        self.model, self.costs = model, layer_costs(model)

    def link(self, first: int, last: int) -> Link:
        """Return a chunk, of the model as it is now."""
        chunk = Chunk(self.model, first, last)
        return Link(chunk, {name: chunk.tied.get(name, name) for name, _ in chunk.named_parameters()}, chunk.tied)


@dataclass(frozen=True, eq=False)
class Piece:
    """One stage of a cut model on this rank, before anybody shards it.

    run      (what came from the stage before, tokens, labels, positions=, ...) -> what goes on
    logical  by the names of the module's parameters, what each is to the whole model
    tied     the names of those that other stages have copies of
    """

    stage: int
    module: nn.Module
    run: Callable[..., tuple[Tensor, ...]]
    logical: dict[str, Logical]
    tied: list[str]

    def local(self, names: Sequence[str]) -> list[str]:
        """Return the names here of those parameters of the whole model that are here, in the order given."""
        found: dict[str, str] = {of.name: local for local, of in self.logical.items()}
        return [found[name] for name in names if name in found]


@dataclass(frozen=True, eq=False)
class CutModel:
    """What this rank holds.

    sequence  how rows are shared out, None where they are whole
    holders   by its name in the whole model, the ranks of the pipeline that hold a tied parameter
    """

    pieces: list[Piece]
    sequence: SequenceCut | None
    holders: dict[str, list[int]]


def cut_model(
    model: nn.Module, layout: Layout, lines: Lines, plan: Plan | None = None, chain: Chain | None = None
) -> CutModel:
    """Keep this rank's part of a model that every rank has built whole, with equal values.

    plan    how tp cuts the leaves; None: the GPT's own
    chain   what pp cuts, be it into one stage; None: the GPT's layers, or nothing where there is one stage
    Writes  the model: its leaves are replaced, and what other ranks hold is freed
    Raises  UserError as `tensor_parallel`, `cut_sequence` and `partition`, or if the model cannot be cut so
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    chain = chain or _chain(model, layout)
    placement = tensor_parallel(model, _plan(model, layout, plan), lines.tp, sequence_parallel=layout.tokens)
    sequence = cut_sequence(model, layout.sequence, lines.sp) if layout.sp > 1 else None

    def logical(name: str, *, is_copy: bool) -> Logical:
        place = placement[name]
        part = Slice(place, lines.tp.rank, lines.tp.size) if isinstance(place, Shard) else WHOLE
        return Logical(name, shapes[name], part, not is_copy and counts(place, lines.coords, over=("tp",)))

    if chain is None:
        names = {name: logical(name, is_copy=False) for name in shapes}
        return CutModel([Piece(0, model, _without_bundle(model), names, [])], sequence, {})
    bounds = partition(chain.costs, layout.stages)
    if layout.schedule == "zb_h1" and isinstance(chain, GPTChain):
        _check_split(bounds, layout)
    mine = range(lines.pp.rank, layout.stages, layout.pp)
    links = {stage: chain.link(bounds[stage], bounds[stage + 1]) for stage in mine}
    holders = _holders([name for link in links.values() for name in link.names.values()], list(shapes), lines.pp)
    pieces = []
    for stage, link in links.items():
        names = {local: logical(name, is_copy=local in link.copies) for local, name in link.names.items()}
        tied = [local for local, of in names.items() if of.name in holders]
        pieces.append(Piece(stage, link.module, link.module, names, tied))
    _free(model, [link.module for link in links.values()])
    return CutModel(pieces, sequence, holders)


def _check_split(bounds: Sequence[int], layout: Layout) -> None:
    """Raise UserError if a stage is one end of a GPT alone: its backward has no halves."""
    ends = {(0, 1): "the embedding", (bounds[-1] - 1, bounds[-1]): "the head"}
    for stage, span in enumerate(pairwise(bounds)):
        if span in ends:
            what = f"stage {stage} of pp {layout.pp} is {ends[span]} alone, and zb_h1 splits the backward of blocks"
            raise UserError(what, fix="the schedule 1f1b, or fewer stages")


def _chain(model: nn.Module, layout: Layout) -> Chain | None:
    """Return the layers of a model that is to be cut by depth and brings no chain; None where it need not be."""
    if layout.pp == 1:
        return None
    if not isinstance(model, GPT):
        what = f"pp={layout.pp} is to cut a {type(model).__name__}, of which only its author knows the layers"
        raise UserError(what, fix="a minispeed.model.gpt.GPT, chain=..., or pp=1")
    return GPTChain(model)


def _holders(mine: Sequence[str], names: Sequence[str], group: Group) -> dict[str, list[int]]:
    """Return the ranks that hold each parameter of which there are several copies.

    mine  the whole model's name of each parameter here, as often as it is here
    """
    held = everyones(group, [mine.count(name) for name in names])  # (ranks, names)
    tied = [index for index, number in enumerate(held.sum(0).tolist()) if number > 1]
    return {names[index]: held[:, index].nonzero().flatten().tolist() for index in tied}


def _plan(model: nn.Module, layout: Layout, plan: Plan | None) -> Plan:
    if plan is not None or layout.tp == 1:
        return plan or {}
    if not isinstance(model, GPT):
        what = f"tp={layout.tp} is to cut a {type(model).__name__}, which brings no plan"
        raise UserError(what, fix="plan={name pattern: Column(), Row(), ...}")
    return gpt_plan(model.config)


def _without_bundle(model: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    """Return a model as a stage that is first and last."""

    def run(inputs: tuple[Tensor, ...], *rows: Tensor, **attached: Any) -> tuple[Tensor, ...]:
        return (model(*rows, **attached),)

    return run


def _free(model: nn.Module, kept: Sequence[nn.Module]) -> None:
    """Let go of the memory of parameters that other ranks hold."""
    here = {p for module in kept for p in module.parameters()}
    for p in model.parameters():
        if p not in here:
            p.data = p.data.new_empty(0)
