"""`initialize`: what DeepSpeed's call is given, sorted out, and an engine made of it.

    engine, optimizer, dataloader, scheduler = minispeed.initialize(
        model=model, model_parameters=model.parameters(), config={"train_batch_size": 8, ...})

The same call takes a Module first and flat settings: `initialize(model, train_batch_size=32, train_lr=1e-3, ...)`.

https://deepspeed.readthedocs.io/en/latest/initialize.html
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minispeed.collective.agree import agree
from minispeed.collective.trace import Trace, Traced
from minispeed.collective.world import current_world
from minispeed.config import Config, read_config, values_of
from minispeed.deepspeed.engine import DeepSpeedEngine
from minispeed.deepspeed.loader import make_loader
from minispeed.deepspeed.logging import print_rank_0
from minispeed.deepspeed.lr_schedules import SCHEDULERS
from minispeed.deepspeed.mpu import groups_of
from minispeed.deepspeed.optimizer import adopt, check_tested, named_groups
from minispeed.deepspeed.pipe import PipelineModule
from minispeed.deepspeed.pipe_engine import PipelineEngine
from minispeed.deepspeed.pipe_layout import num_pipelines, share_stages
from minispeed.deepspeed.sharing import Sharing, share, with_asked
from minispeed.deepspeed.start import init_distributed
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.optim import SGD, Adam, AdamW
from minispeed.precision import DTYPES, Precision
from minispeed.scaler import LossScaler
from minispeed.zero.absent import owner_of
from minispeed.zero.frozen import adamw_for
from minispeed.zero.onebit import compression_named
from minispeed.zero.sharded import Offload
from minispeed.zero.unit import ShardedUnit

OURS = {"Adam": Adam, "AdamW": AdamW, "SGD": SGD}
CPU = torch.device("cpu")

Maker = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    mesh_param: Any = None,
    config_params: Mapping[str, Any] | str | Path | None = None,
    **flat: Any,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """Return the engine, its optimizer, a loader of the training data and the learning-rate schedule.

    args              an object whose `deepspeed_config` is the path of a configuration; a Module is taken as the model
    model             what is trained; its parameters are taken over. A PipelineModule gets a PipelineEngine
    optimizer         one made of the model's parameters, or a function of them; else the configuration's
    model_parameters  parameters or parameter groups to train; all trainable ones when absent
    training_data     a dataset; the loader gives this rank's micro-batches
    lr_scheduler      an object with `step`, or a function of the optimizer that makes one; else the configuration's
    config            a dict or the path of a JSON file (`config_params` is its old name)
    flat              settings in the flat dialect; see `minispeed.config.flat`
    mpu               the groups of a caller who has cut the model himself: see `minispeed.deepspeed.mpu`
    `distributed_port` matters nowhere here, and `mesh_param` other than of size 1 is refused.

    Where nobody has started the process group, it is started.
    Raises  UserError; DeepSpeedConfigError for what is wrong in the configuration
    """
    if isinstance(args, nn.Module) and model is None:
        args, model = None, args
    if not isinstance(model, nn.Module) or isinstance(model, DeepSpeedEngine):
        raise UserError(f"initialize got {type(model).__name__} for a model", fix="initialize(model=a torch Module)")
    for name, p in model.named_parameters():
        owner = owner_of(p)
        if isinstance(owner, ShardedUnit) and any(p is other for other in owner.parameters.values()):
            what = f"{name} belongs to an engine already"
            raise UserError(what, fix="engine.destroy() first, or a new model")
    _refuse_cut_rows(mesh_param)
    init_distributed(dist_init_required=dist_init_required)
    world = current_world()
    trace = Trace()
    cut = groups_of(mpu, world.group)
    source = with_asked(model, _source(args, config, config_params))
    if cut is None:
        settings = read_config(source, ranks=num_pipelines(model, world.size), flat=flat)
    else:
        settings = read_config(source, data_parallel=cut.data.size, flat=flat)
    agree(world.group, values_of(settings))
    for line in settings.notes:
        print_rank_0(line)
    if settings.dump_state:
        print_rank_0(settings)
    if isinstance(model, PipelineModule):
        sharing = share_stages(model, settings, cut, world.group)
        every = settings.pipeline.activation_checkpoint_interval
        model.activation_checkpoint_interval = every or model.activation_checkpoint_interval
    else:
        sharing = share(model, settings, cut, world.group)
    if settings.wall_clock_breakdown:
        sharing = replace(sharing, group=Traced(sharing.group, trace))
    if not isinstance(model, PipelineModule):  # its own stage alone goes there
        _move(model, world.device)
    core = _make_core(model, sharing, settings, optimizer, model_parameters)
    engine = (
        PipelineEngine(model, world, settings, core, trace)
        if isinstance(model, PipelineModule)
        else DeepSpeedEngine(model, world, settings, core, trace)
    )
    engine.lr_scheduler = _make_scheduler(settings, lr_scheduler, core)
    if training_data is not None:
        engine.training_dataloader = make_loader(
            training_data,
            micro_batch=settings.batch.micro,
            group=sharing.group if core is None else core.lines.dp,
            collate_fn=collate_fn,
            drop_last=settings.dataloader_drop_last,
        )
    if isinstance(engine, PipelineEngine) and training_data is not None:
        engine.read_in_order(engine.training_dataloader)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _refuse_cut_rows(mesh_param: Any) -> None:
    """Raise UserError where ranks are to share each row."""
    if mesh_param is not None and tuple(mesh_param)[1:] not in ((), (1,)):
        what = f"mesh_param={mesh_param}: only the batch and layers are divided over ranks here, no rows"
        raise UserError(what, fix="all ranks data-parallel")


def _source(args: Any, config: Any, config_params: Any) -> Any:
    """Return the one configuration among those given."""
    named = {
        "config": config,
        "config_params": config_params,
        "--deepspeed_config": getattr(args, "deepspeed_config", None),
    }
    given = [(name, one) for name, one in named.items() if one is not None]
    if len(given) > 1:
        raise UserError(f"two configurations: {given[0][0]} and {given[1][0]}", fix="one of them")
    return given[0][1] if given else None


def _move(model: nn.Module, device: torch.device) -> None:
    """Move a model to where it is computed, but for parameters that were born in pieces."""
    if all(owner_of(p) is None for p in model.parameters()):
        model.to(device)


def _make_core(model: nn.Module, sharing: Sharing, settings: Config, optimizer: Any, parameters: Any) -> Engine | None:
    if optimizer is not None and settings.optimizer is not None:
        what = f"an optimizer twice: the argument, and {settings.optimizer.type} in the configuration"
        raise UserError(what, fix="one of them")
    precision = _precision(model, settings)
    if optimizer is None and settings.optimizer is None:
        if sharing.plan is not None:
            what = "a model is to be cut by width, and there is no optimizer to train it"
            raise UserError(what, fix='"optimizer": {"type": "AdamW"} in the configuration')
        model.to(precision.compute)
        return None
    groups: list[Any] = list(parameters if parameters is not None else model.parameters())
    if callable(optimizer):
        optimizer = optimizer(groups)
    if optimizer is not None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            what = f"initialize got {type(optimizer).__name__} for an optimizer"
            raise UserError(what, fix="an optimizer of torch.optim's kind, or a function that makes one")
        check_tested(optimizer, settings.zero.stage, allowed=settings.zero_allow_untested_optimizer)
        groups, make = optimizer.param_groups, adopt(optimizer)
    else:
        make = _maker(settings)
    zero = settings.zero
    core = Engine(
        model,
        sharing.group,
        layout=sharing.layout,
        plan=sharing.plan,
        chain=model if isinstance(model, PipelineModule) else None,
        precision=precision,
        zero=zero.stage,
        clip=settings.gradient_clipping,
        optimizer=make,
        param_groups=named_groups(model, groups),
        scaler=_scaler(settings),
        bucket=zero.reduce_bucket_size if zero.stage else None,
        overlap=bool(zero.overlap_comm),
        prefetch=zero.prefetch_bucket_size,
        persistence=zero.param_persistence_threshold,
        offload=Offload(
            states=CPU if zero.offload_optimizer.device == "cpu" else None,
            parameters=CPU if zero.offload_param.device == "cpu" else None,
        ),
        divisor=sharing.replicas * settings.batch.accumulation,
        predivide=sharing.replicas if settings.prescale_gradients else settings.gradient_predivide_factor,
        compression=compression_named(settings.compression, settings.compression_freeze_step),
    )
    sharing.settle(core)
    return core


def _precision(model: nn.Module, settings: Config) -> Precision:
    """Return the dtypes that the configuration asks for; a model in fp64 stays so.

    Raises  UserError if the model is in half precision and the configuration does not say so
    """
    held = {p.dtype for p in model.parameters() if p.is_floating_point()}
    compute = DTYPES[settings.dtype]
    if compute == torch.float32 and held - {torch.float32, torch.float64}:
        name = next(name for name, dtype in DTYPES.items() if dtype in held - {torch.float32, torch.float64})
        what = f"the model holds {name} parameters, and the configuration asks for fp32"
        raise UserError(what, fix=f'"{name}": {{"enabled": true}}, or model.float()')
    if compute == torch.float32 and torch.float64 in held:
        if len(held) > 1:
            raise UserError("the model holds parameters of fp64 and of fp32", fix="model.float(), or model.double()")
        return Precision(torch.float64)
    reduce, accumulate = settings.communication_data_type, settings.data_types.grad_accum_dtype
    return Precision(compute, "config", reduce=DTYPES[reduce], accumulate=DTYPES[accumulate or settings.dtype])


def _scaler(settings: Config) -> LossScaler | None:
    fp16 = settings.fp16
    if not fp16.enabled:
        return LossScaler.static(1.0) if settings.communication_data_type == "fp16" else None
    if not fp16.is_dynamic:
        return LossScaler.static(fp16.loss_scale)
    return LossScaler(
        scale=fp16.first_scale,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
        floor=fp16.min_loss_scale,
    )


def _maker(settings: Config) -> Maker:
    """Return what makes the configuration's optimizer of parameter groups."""
    assert settings.optimizer is not None
    kind, params = settings.optimizer.type, dict(settings.optimizer.params)
    if kind == "AdamW":
        return adamw_for(compression_named(settings.compression, settings.compression_freeze_step), **params)
    return lambda groups: (OURS.get(kind) or getattr(torch.optim, kind))(groups, **params)


def _make_scheduler(settings: Config, given: Any, core: Engine | None) -> Any:
    """Return the caller's schedule, or the configuration's, or None."""
    if core is None:
        return given
    if given is None and settings.scheduler is not None:
        return SCHEDULERS[settings.scheduler.type](core.optimizer, **settings.scheduler.params)
    return given(core.optimizer) if callable(given) and not hasattr(given, "step") else given
