"""Supervised fine-tuning: conversations in, a model that answers out, and everything on the way written down.

    read and tokenise -> choose what was left open -> step, step, step (evaluate, sample, save) -> score -> RUN

The order of the rows, the model's first weights and the number of steps are all functions of the effective options, so
`minispeed sft --config RUN/run.json` gives the same weights bit for bit.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minispeed.chat.chat_model import ChatModel, check_vocabulary
from minispeed.chat.commands import SftOptions
from minispeed.chat.defaults import DEFAULT_SEQ, Choice, count_ranks, fill_in
from minispeed.chat.interrupts import interrupts_left_to_ranks
from minispeed.chat.prepare import prepare
from minispeed.chat.prepared import Prepared
from minispeed.chat.run import RunDirectory, use_threads
from minispeed.chat.show import report_text
from minispeed.chat.tracing import Tracer
from minispeed.chat.trainer import Trainer
from minispeed.collective.group import Group
from minispeed.collective.launch import Backend, launch, under_torchrun
from minispeed.collective.numbers import barrier
from minispeed.collective.world import World, current_world
from minispeed.errors import UserError
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.precision import DTYPES, Precision, choose_precision


def sft(options: SftOptions) -> int:
    """Do `minispeed sft`, on as many ranks as asked for or as torchrun has started. Returns the exit code."""
    check_options(options)
    if under_torchrun():
        return launch(run_rank, options, ranks=options.ranks if options.ranks and options.ranks > 1 else None)[0]
    options = count_ranks(options)
    assert options.ranks is not None
    if options.ranks == 1:
        return run_rank(current_world(), options)
    open_model_and_data(recall(options) if options.resume else options)  # what is wrong with them is said here, once
    with interrupts_left_to_ranks():
        return launch(run_rank, options, ranks=options.ranks, backend=backend_for(options.ranks))[0]


def check_options(options: SftOptions) -> None:
    """Raise UserError for what can be told before any data is read."""
    told = [name for name in ("steps", "epochs", "minutes") if getattr(options, name) is not None]
    if len(told) > 1 and not options.resume:
        raise UserError(f"--{told[0]} and --{told[1]} both say when to stop", fix=f"--{told[0]} alone")
    if options.trace and options.steps is not None and options.steps <= options.trace_steps:
        what = f"--trace-steps {options.trace_steps}, from the second on, are not in a run of {options.steps}"
        raise UserError(what, fix=f"--steps {options.trace_steps + 1}")
    if options.deep != "none" and Path(options.model).is_dir():
        raise UserError(f"--deep {options.deep} is for a new model, and {options.model} is one", fix="no --deep")
    if options.sequence_parallel and options.tp == 1:
        raise UserError("--sequence-parallel cuts among the ranks of --tp, which is 1", fix="--tp 2")
    if options.pipeline_schedule != "1f1b" and options.pp == 1:
        what = f"--pipeline-schedule {options.pipeline_schedule} orders a pipeline, and --pp is 1"
        raise UserError(what, fix="--pp 2, or no --pipeline-schedule")
    if not options.dry_run:
        RunDirectory(options.out).check(resume=options.resume)


def run_rank(world: World, options: SftOptions) -> int:
    """Train as one rank of a world; only rank 0 prints and writes, but for its part of each checkpoint."""
    tracer, run = Tracer(options.trace, options.trace_steps), RunDirectory(options.out)
    group = tracer.wrap(world.group)
    threads = use_threads(options.threads, ranks=group.size)
    if options.resume:
        options = recall(options)
    options = count_ranks(replace(options, ranks=group.size))
    opened = open_model_and_data(options) if group.rank == 0 else None
    barrier(group)  # the others find the data tokenised
    chat, prepared, from_scratch = opened or open_model_and_data(options)
    chat.model.to(world.device)
    options, choices = fill_in(options, chat.model.config, from_scratch=from_scratch)
    if options.dropout is None:
        options = replace(options, dropout=chat.model.config.dropout)
        choices.append(Choice("dropout", options.dropout, "the model's own"))
    precision = agree_on_precision(options.dtype, group)
    options = replace(options, dtype=precision.name, threads=threads)
    num_parameters = sum(p.numel() for p in chat.model.parameters())
    trainer = Trainer(options, run, chat, prepared, group, tracer)
    for line in [
        report_text(prepared.report),
        f"model {options.model}: {num_parameters / 1e6:.2f}M parameters",
        *map(str, choices),
        f"--dtype {precision.name}: {precision.reason}",
    ]:
        trainer.say(line)
    if options.dry_run:
        trainer.say(f"a dry run: stopped before step 1 of {trainer.total or 'as many as fit the time'}")
        return 0
    if group.rank == 0:
        run.create(resume=options.resume)
    barrier(group)
    return trainer.train()


def backend_for(ranks: int) -> Backend:
    """Return what ranks of this machine speak: NCCL where each has a GPU."""
    return "nccl" if torch.cuda.device_count() >= ranks else "gloo"


def agree_on_precision(name: str, group: Group) -> Precision:
    """Choose the precision on rank 0: a measurement may come out otherwise on another."""
    precision = choose_precision(name)
    chosen = torch.tensor([list(DTYPES).index(precision.name)])
    group.broadcast(chosen, 0).wait()
    return replace(precision, compute=list(DTYPES.values())[int(chosen)])


def recall(options: SftOptions) -> SftOptions:
    """Fill what was left open with what the run to be resumed had chosen."""
    stored = RunDirectory(options.out).effective_options("sft")
    open_ones = {name: value for name, value in stored.items() if getattr(options, name) in (None, "auto")}
    if options.steps is not None or stored.get("steps") is not None:
        open_ones |= {"epochs": None, "minutes": None}
    return replace(options, **open_ones)


def open_model_and_data(options: SftOptions) -> tuple[ChatModel, Prepared, bool]:
    """Tokenise the data (or find it tokenised) and build or load the model; the last says whether it is new.

    Raises  UserError if the data cannot be read, or tokenizer, model and row length do not go together
    """
    directory = Path(options.model)
    from_scratch = not directory.is_dir()
    check_length(options, preset(options.model) if from_scratch else ChatModel.read_config(directory))
    tokenizer = options.tokenizer if from_scratch else options.tokenizer or directory / "tokenizer.json"
    prepared = prepare(
        options.data,
        options.eval_data,
        cache_folder(options),
        tokenizer=tokenizer,
        vocab_size=options.vocab_size,
        train_on=options.train_on,
        seq=options.seq or DEFAULT_SEQ,
        skip_bad=options.skip_bad,
        workers=2,
    )
    if from_scratch:
        deep = {"deep": options.deep, "deep_dilation": options.deep_dilation, "deep_period": options.deep_period}
        how: dict[str, Any] = {"attention": options.attention, "dropout": options.dropout or 0.0, **deep}
        config = preset(options.model, vocab_size=prepared.tokenizer.size, **how)
        if config.positions == "rotary":  # it reads as far as it was trained, and says so
            config = replace(config, max_positions=options.seq or min(DEFAULT_SEQ, config.max_positions))
        chat = ChatModel(GPT(config, seed=options.seed), prepared.tokenizer, prepared.template)
    else:
        chat = ChatModel.load(directory, attention=options.attention)
        check_vocabulary(chat.model.config, prepared.tokenizer, directory)
        p = chat.model.config.dropout if options.dropout is None else options.dropout
        chat.model.set_dropout(p, seed=options.seed)
    return chat, prepared, from_scratch


def check_length(options: SftOptions, config: GPTConfig) -> None:
    """Raise UserError if the rows asked for are longer than the model reads; before any data is touched."""
    if options.seq is not None and options.seq > config.max_positions:
        raise UserError(
            f"--seq {options.seq} is longer than the {config.max_positions} positions of {options.model}",
            fix=f"--seq {config.max_positions}",
        )


def cache_folder(options: SftOptions) -> Path:
    """Return the folder that holds this data tokenised this way; `prepare` checks its content."""
    asked: list[Any] = [
        options.data,
        options.eval_data,
        options.tokenizer,
        options.model if options.tokenizer is None else "",
    ]
    asked += [options.vocab_size, options.train_on, options.seq or DEFAULT_SEQ, options.skip_bad]
    name = hashlib.blake2b(repr(asked).encode() + str(Path.cwd()).encode(), digest_size=10).hexdigest()
    return (options.cache or Path.home() / ".cache" / "minispeed") / name
