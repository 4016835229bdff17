"""Supervised fine-tuning: conversations in, a model that answers out, and everything on the way written down.

    read and tokenise -> choose what was left open -> step, step, step (evaluate, sample, save) -> score -> RUN

The order of the rows, the model's first weights and the number of steps are all functions of the effective options, so
`minispeed sft --config RUN/run.json` gives the same weights bit for bit.
"""

import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path

import torch

from minispeed.chat.auto import open_ones, plan_run
from minispeed.chat.defaults import Choice, count_ranks, fill_in
from minispeed.chat.interrupts import ended_by_sigterm, signals_left_to_ranks
from minispeed.chat.opening import model_folder, open_model_and_data
from minispeed.chat.preflight import clear
from minispeed.chat.run import RunDirectory, has_checkpoints, use_threads
from minispeed.chat.sft_options import FREEZE_STEP, SftOptions
from minispeed.chat.show import report_text
from minispeed.chat.tracing import Tracer
from minispeed.chat.trainer import Trainer
from minispeed.collective.group import Group
from minispeed.collective.launch import Backend, launch, restart_count, under_torchrun
from minispeed.collective.numbers import barrier
from minispeed.collective.world import World, current_world
from minispeed.errors import UserError
from minispeed.precision import DTYPES, Precision, choose_precision

BEGUN_WITH = ("model", "template", "train_on", "seq")  # what a run's prepared data and model are made by
ADAPTERS = ("lora_rank", "lora_alpha", "lora_targets", "lora_dropout", "lora_lr")


def sft(options: SftOptions) -> int:
    """Do `minispeed sft`, on as many ranks as asked for or as torchrun has started. Returns the exit code."""
    is_again = is_restart(options)
    if is_again:
        options = replace(options, resume=has_checkpoints(options.out))
    check_options(options, is_again=is_again)
    if under_torchrun():
        return launch(run_rank, options, ranks=options.ranks if options.ranks and options.ranks > 1 else None)[0]
    if options.auto and options.ranks is None:
        options = replace(options, ranks=max(1, torch.cuda.device_count()))
    options = count_ranks(options)
    assert options.ranks is not None
    if options.ranks == 1:
        return run_rank(current_world(), options)
    open_model_and_data(recall(options) if options.resume else options)  # what is wrong with them is said here, once
    with signals_left_to_ranks():
        return launch(run_rank, options, ranks=options.ranks, backend=backend_for(options.ranks))[0]


def is_restart(options: SftOptions) -> bool:
    """Whether torchrun starts again, after a rank was lost, what this very command had begun in --out.

    Such a run goes on from its last checkpoint, or, where there is none yet, begins anew in place.
    """
    if not restart_count() or not (options.out / "run.json").exists():
        return False
    began = RunDirectory(options.out).effective_options("provenance").get("command")
    return began == [Path(sys.argv[0]).name, *sys.argv[1:]]


def check_options(options: SftOptions, *, is_again: bool = False) -> None:
    """Raise UserError for what can be told before any data is read.

    is_again  what lies in --out is this command's own
    """
    told = [name for name in ("steps", "epochs", "minutes") if getattr(options, name) is not None]
    if len(told) > 1 and not options.resume:
        raise UserError(f"--{told[0]} and --{told[1]} both say when to stop", fix=f"--{told[0]} alone")
    if options.trace and options.steps is not None and options.steps <= options.trace_steps:
        what = f"--trace-steps {options.trace_steps}, from the second on, are not in a run of {options.steps}"
        raise UserError(what, fix=f"--steps {options.trace_steps + 1}")
    if model_folder(options) is not None:
        check_old_model(options)
    check_adapters(options)
    if options.freeze_step != FREEZE_STEP and options.compression == "none":
        what = f"--freeze-step {options.freeze_step} is when compression begins, and --compression is none"
        raise UserError(what, fix="--compression onebit, or no --freeze-step")
    if options.sequence_parallel and options.tp == 1:
        raise UserError("--sequence-parallel cuts among the ranks of --tp, which is 1", fix="--tp 2")
    if options.pipeline_schedule != "1f1b" and options.pp == 1:
        what = f"--pipeline-schedule {options.pipeline_schedule} orders a pipeline, and --pp is 1"
        raise UserError(what, fix="--pp 2, or no --pipeline-schedule")
    if not options.dry_run and not is_again:
        clear(options.out)
        RunDirectory(options.out).check(resume=options.resume)


def check_old_model(options: SftOptions) -> None:
    """Raise UserError for what only a new model can be told."""
    if options.tokenizer is not None:
        raise UserError(f"--tokenizer is for a new model, and {options.model} has its own", fix="no --tokenizer")
    if options.deep != "none":
        raise UserError(f"--deep {options.deep} is for a new model, and {options.model} is one", fix="no --deep")


def check_adapters(options: SftOptions) -> None:
    """Raise UserError for what is told of adapters that are not there, or cannot be."""
    told = {"alpha": options.lora_alpha, "dropout": options.lora_dropout, "targets": options.lora_targets}
    told["lr"] = options.lora_lr
    for name, value in told.items():
        if value and not options.lora_rank and not options.resume:
            raise UserError(f"--lora-{name} is for adapters, and --lora-rank is 0", fix="--lora-rank 8")
    if options.lora_lr is not None and options.lr == 0:
        what = "the schedule is of --lr, which is 0, and --lora-lr is what adapters learn at beside it"
        raise UserError(what, fix=f"--lr {options.lora_lr:g}")


def run_rank(world: World, options: SftOptions) -> int:
    """Train as one rank of a world; only rank 0 prints and writes, but for its part of each checkpoint."""
    with ended_by_sigterm():
        return _train(world, options)


def _train(world: World, options: SftOptions) -> int:
    tracer, run = Tracer(options.trace, options.trace_steps), RunDirectory(options.out)
    group = tracer.wrap(world.group)
    threads = use_threads(options.threads, ranks=group.size)
    asked = options.minutes
    if options.resume:
        options = recall(options)
    options = count_ranks(replace(options, ranks=group.size))
    opened = open_model_and_data(options, world.device) if group.rank == 0 else None
    barrier(group)  # the others find the data tokenised
    chat, prepared, from_scratch = opened or open_model_and_data(options, world.device)
    planned = open_ones(options)
    options, choices = fill_in(options, chat.model.config, from_scratch=from_scratch)
    if options.dropout is None:
        options = replace(options, dropout=chat.model.config.dropout)
        choices.append(Choice("dropout", options.dropout, "the model's own"))
    precision = agree_on_precision(options.dtype, group)
    options, plan_lines = replace(options, dtype=precision.name, threads=threads), list[str]()
    if planned:
        choices = [choice for choice in choices if choice.name not in planned]
        config, device = chat.model.config, world.device
        options, plan_lines = plan_run(options, config, planned=planned, devices=group.size, device=device)
    num_parameters = sum(p.numel() for p in chat.model.parameters())
    trainer = Trainer(options, run, chat, prepared, group, tracer)
    if asked is not None and options.minutes is None:
        end = f"{options.steps} steps" if options.steps else f"{options.epochs} epochs"
        trainer.say(f"--minutes {asked:g} is left out: the run is of {end}")
    for line in [
        report_text(prepared.report),
        f"model {options.model}: {num_parameters / 1e6:.2f}M parameters",
        *chat.notes,
        *map(str, choices),
        f"--dtype {precision.name}: {precision.reason}",
        *plan_lines,
        *owed_lines(options),
    ]:
        trainer.say(line)
    if options.dry_run:
        trainer.say(f"a dry run: stopped before step 1 of {trainer.total or 'as many as fit the time'}")
        return 0
    if group.rank == 0:
        run.create(resume=options.resume)
    barrier(group)
    return trainer.train()


def owed_lines(options: SftOptions) -> list[str]:
    """Return what to say of a compression that goes on from a checkpoint, which has not what it owes."""
    if options.compression == "none" or not options.resume:
        return []
    what = f"--compression {options.compression}: what the ranks still owed is in no checkpoint and is lost"
    return [f"{what}; gradients travel in full for {options.freeze_step} updates again"]


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
    """Fill what was left open with what the run to be resumed had chosen, its adapters too.

    Raises  UserError if the run was begun with another model, or other adapters
    """
    stored = RunDirectory(options.out).effective_options("sft")
    defaults = {field.name: field.default for field in fields(SftOptions)}
    defaults |= {field.name: [] for field in fields(SftOptions) if field.default is MISSING}
    for name in (*BEGUN_WITH, *ADAPTERS):
        given, began = getattr(options, name), stored.get(name, defaults[name])
        if given != began and (name == "model" or given != defaults[name]):
            flag, out = f"--{name.replace('_', '-')}", options.out
            raise UserError(f"{flag} is {given}, and the run in {out} began with {began}", fix=f"{flag} {began}")
    steps = stored.get("steps")
    open_ones = {name: value for name, value in stored.items() if getattr(options, name) in (None, "auto")}
    untold = [name for name in ADAPTERS if name in stored and getattr(options, name) == defaults[name]]
    open_ones |= {name: stored[name] for name in untold}
    if options.epochs is not None and options.steps in (None, steps):
        open_ones |= {"steps": None, "minutes": None}
    elif options.steps is not None or steps is not None:
        open_ones |= {"epochs": None, "minutes": None}
    return replace(options, **open_ones)
