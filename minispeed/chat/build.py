"""Build what a run trains with out of its options: the rows, the learning rate's course, the engine.

Options are words of a command line, each checked alone. Here they become parts, and those that do not go together are
refused, before the first step.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from minispeed.axes import Layout
from minispeed.chat.chat_model import ChatModel
from minispeed.chat.documents import Documents
from minispeed.chat.opening import lora_of
from minispeed.chat.pack import Packing
from minispeed.chat.prepared import Prepared
from minispeed.chat.read import stem
from minispeed.chat.sft_options import SftOptions
from minispeed.collective.group import Group
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.model.gpt import GPT
from minispeed.model.lora import lora_groups
from minispeed.model.recompute import recompute
from minispeed.precision import DTYPES, Precision, choose_precision
from minispeed.scaler import LossScaler
from minispeed.schedules import Schedule, warmup_then
from minispeed.zero.frozen import adamw_for
from minispeed.zero.onebit import compression_named
from minispeed.zero.sharded import Offload

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The options that may be left open and are chosen by the case before a run begins: here each has a value."""

    seq: int
    batch: int
    micro_batch: int
    lr: float
    warmup: int
    weight_decay: float

    @classmethod
    def of(cls, options: SftOptions) -> "Chosen":
        """Return the values of options that `fill_in` has filled in."""
        values = {field.name: getattr(options, field.name) for field in fields(cls)}
        assert None not in values.values(), values
        return cls(**values)


def build_layout(options: SftOptions) -> Layout:
    """Return how the ranks share the model and its rows."""
    return Layout(
        pp=options.pp,
        schedule=options.pipeline_schedule,
        virtual=options.virtual_stages,
        sp=options.sp,
        sequence=options.sequence,
        tp=options.tp,
        tokens=options.sequence_parallel,
    )


def build_rows(options: SftOptions, prepared: Prepared, group: Group) -> tuple[Packing, dict[str, Packing]]:
    """Return the rows to train on and the rows held out, by file; of none where nothing is.

    Raises  UserError if the ranks cannot share a batch evenly, or there is nothing to learn
    """
    chosen, layout = Chosen.of(options), build_layout(options)
    replicas = layout.mesh(group.size).dp
    if chosen.batch % replicas:
        raise UserError(
            f"--batch {chosen.batch} rows do not divide over {replicas} replicas",
            fix=f"--batch {-(-chosen.batch // replicas) * replicas}",
        )
    check_pipeline(layout, chosen.batch // replicas, chosen.micro_batch)
    if layout.tokens and chosen.seq % (layout.sp * layout.tp):
        what = f"--sequence-parallel: rows of {chosen.seq} tokens do not divide by sp x tp = {layout.sp * layout.tp}"
        raise UserError(what, fix=f"--seq {-(-chosen.seq // (layout.sp * layout.tp)) * layout.sp * layout.tp}")
    if not prepared.train.learnt[:].any():
        raise UserError("no token of the training data is learnt: it holds no answer", fix="--train-on all")
    weights = options.weights or None
    train = Packing(prepared.train, seq=chosen.seq, batch=chosen.batch, seed=options.seed, weights=weights)
    files = held_out_files(options, prepared)
    return train, {name: Packing(of, seq=chosen.seq, batch=chosen.batch) for name, of in files.items()}


def held_out_files(options: SftOptions, prepared: Prepared) -> dict[str, Documents]:
    """Return the documents of each file of --eval-data, by the file's name, or what was held out of --data."""
    if not options.eval_data:
        return {"held out": prepared.eval} if len(prepared.eval) else {}
    names = [stem(path) for path in options.eval_data]
    unique = [
        f"{name} {names[:index].count(name) + 1}" if name in names[:index] else name for index, name in enumerate(names)
    ]
    return {name: of_source(prepared.eval, source) for source, name in enumerate(unique)}


def of_source(documents: Documents, source: int) -> Documents:
    """Return the documents of one file, which lie together; their arrays are views."""
    low, high = np.searchsorted(documents.source, [source, source + 1]).tolist()
    (start, stop), (first, last) = documents.offsets[[low, high]].tolist(), documents.cut_offsets[[low, high]].tolist()
    return replace(
        documents,
        tokens=documents.tokens[start:stop],
        learnt=documents.learnt[start:stop],
        offsets=documents.offsets[low : high + 1] - start,
        cuts=documents.cuts[first:last],
        cut_offsets=documents.cut_offsets[low : high + 1] - first,
        task=documents.task[low:high],
        source=documents.source[low:high],
    )


def check_pipeline(layout: Layout, rows: int, micro_batch: int) -> None:
    """Raise UserError unless a replica's rows make micro-batches of one size, as many as the schedule can do with."""
    if layout.pp > 1 and rows % micro_batch:
        sizes = " or ".join(str(size) for size in range(1, rows + 1) if rows % size == 0)
        what = (
            f"a pipeline's micro-batches are of one size, and --micro-batch {micro_batch} does not divide {rows} rows"
        )
        raise UserError(what, fix=f"--micro-batch {sizes}")
    layout.programs(-(-rows // micro_batch))


def build_schedule(options: SftOptions, total: int) -> Schedule:
    """Return the learning rate's course over `total` steps; while their number is open, 0, it rises and stays."""
    warmup = Chosen.of(options).warmup
    return warmup_then(options.lr_schedule if total else "constant", warmup=warmup, total=total or warmup + 1)


def build_engine(options: SftOptions, chat: ChatModel, group: Group, schedule: Schedule) -> Engine:
    """Return the engine that trains a model; recomputation and compilation are switched on in the model itself.

    Raises  UserError for --compile at ZeRO stage 3 or with recomputed layers, and as `recompute` and `Engine` do
    """
    chosen, precision, model, lora = Chosen.of(options), build_precision(options, group), chat.model, lora_of(options)
    recompute(model, options.recompute)
    if options.compile and options.recompute not in ("none", "attention"):
        what = f"--compile with --recompute {options.recompute}: a compiled layer saves other things when it runs again"
        raise UserError(what, fix="--recompute attention, or no --compile")
    if options.compile:
        compile_blocks(model, options.zero)
    compression = compression_named(options.compression, options.freeze_step)
    scaler = LossScaler.static(options.loss_scale) if options.loss_scale else LossScaler()
    return Engine(
        model,
        group,
        layout=build_layout(options),
        zero=options.zero,
        precision=precision,
        scaler=scaler if precision.needs_scaler else None,
        bucket=options.bucket,
        overlap=options.overlap,
        prefetch=options.prefetch,
        persistence=options.persistence,
        offload=Offload(
            states=CPU if options.offload_optimizer else None, parameters=CPU if options.offload_param else None
        ),
        compression=compression,
        optimizer=adamw_for(compression, lr=chosen.lr, betas=(0.9, 0.99)),
        schedule=schedule,
        lr=chosen.lr,
        weight_decay=chosen.weight_decay,
        param_groups=None if lora is None else lora_groups(model, lora, chosen.weight_decay, lr=chosen.lr),
        clip=options.clip,
        source=chat.source,
    )


def build_precision(options: SftOptions, group: Group) -> Precision:
    """Return the dtypes; gradients of a single micro-batch are not added up, and stay in the compute dtype."""
    chosen, precision = Chosen.of(options), choose_precision(options.dtype)
    if options.reduce_dtype != "auto":
        precision = replace(precision, reduce=DTYPES[options.reduce_dtype])
    is_one = chosen.batch // build_layout(options).mesh(group.size).dp <= chosen.micro_batch
    return replace(precision, accumulate=precision.compute) if is_one else precision


def compile_blocks(model: GPT, stage: int) -> None:
    """Let torch.compile fuse each block.  Raises UserError at stage 3, whose parameters come and go unseen by it"""
    if stage == 3:
        raise UserError("--compile with --zero 3: a compiled layer reads parameters that are not there", fix="--zero 2")
    for block in model.blocks:
        block.compile()
