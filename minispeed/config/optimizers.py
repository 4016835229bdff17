"""What an optimizer and a schedule may be given, by name, and what DeepSpeed makes of the names.

DeepSpeed's "Adam" decays weights as AdamW does unless "adam_w_mode" is false, its "AdamW" always; its decay is 0 where
none is given, with "torch_adam" torch's 0.01. Its schedules rise to the optimizer's rate where they are given no other
(0.19.8, runtime/engine.py and runtime/lr_schedules.py). Names are read in whatever case they are written.
"""

from collections.abc import Mapping
from dataclasses import Field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from minispeed.config.check import (
    AMOUNT,
    BETAS,
    BOOLEAN,
    COUNT,
    MISFIT,
    ONE_OR_MORE,
    SETTING,
    DeepSpeedConfigError,
    Type,
    choice,
    maybe,
    number,
    read_value,
    shown,
    typed,
)
from minispeed.config.key import HONOURED, NO_EFFECT, REFUSED, Given, Key, Sifted, example, sift
from minispeed.errors import nearest
from minispeed.schedules import SCHEDULES

OPTIMIZER, SCHEDULER = "optimizer.params.", "scheduler.params."

_LR = Key(AMOUNT, 1e-3, HONOURED, "learning rate, unless a schedule gives it")
_DECAY = Key(AMOUNT, 0.0, HONOURED, "weight decay")
_KERNEL = Key(maybe(BOOLEAN), None, NO_EFFECT, "one fused kernel is used wherever there is one")
_SETTLED = {name: _KERNEL for name in ("foreach", "fused", "capturable", "set_grad_none")}
_CLIP = '"gradient_clipping": 1.0'
_TORCH = Key(SETTING, None, HONOURED, "as in torch.optim")
_NEVER = {
    "maximize": Key(BOOLEAN, False, REFUSED, "losses are made smaller"),
    "differentiable": Key(BOOLEAN, False, REFUSED, "nothing is differentiated through a step"),
    "max_grad_norm": Key(AMOUNT, None, REFUSED, "gradients are clipped by the engine", fix=_CLIP),
}

ADAM = {
    "lr": _LR,
    "betas": Key(BETAS, (0.9, 0.999), HONOURED, "how slowly the two moments forget"),
    "eps": Key(AMOUNT, 1e-8, HONOURED, "added to the root of the second moment"),
    "weight_decay": _DECAY._replace(what="weight decay; with torch_adam 0.01 where it is not given and decays weights"),
    "adam_w_mode": Key(BOOLEAN, True, HONOURED, "the decay acts on weights, not on gradients; AdamW's always does"),
    "torch_adam": Key(BOOLEAN, False, HONOURED, "the defaults of torch's; the formulas are the same"),
    "bias_correction": Key(BOOLEAN, True, REFUSED, "both moments start at 0 and are corrected for it"),
    "amsgrad": Key(BOOLEAN, False, REFUSED, "the largest second moment is not kept"),
    "fp32_optimizer_states": Key(BOOLEAN, True, REFUSED, "moments are kept in the masters' dtype"),
    **_SETTLED,
    **_NEVER,
}
SGD = {
    "lr": _LR,
    "momentum": Key(AMOUNT, 0.0, HONOURED, "share of the last update that is kept"),
    "weight_decay": _DECAY,
    "nesterov": Key(BOOLEAN, False, HONOURED, "the gradient is taken ahead of the momentum; needs some"),
    "dampening": Key(AMOUNT, 0.0, REFUSED, "gradients are not dampened"),
    **_SETTLED,
    **_NEVER,
}

# settings by the optimizer's name; None: what torch's class takes, checked when it is made
OPTIMIZERS: dict[str, Mapping[str, Key] | None] = {
    "Adam": ADAM,
    "AdamW": ADAM,
    "SGD": SGD,
    **{name: None for name in "Adadelta Adagrad Adamax ASGD NAdam RAdam RMSprop Rprop".split()},
}
_ONE_BIT = 'gradients travel in one bit by "compression": "onebit", beside AdamW, and momenta do not'
_MUP = "the rates of maximal update parametrisation are not here"
NOT_MADE = {
    "OneBitAdam": _ONE_BIT,
    "ZeroOneAdam": _ONE_BIT,
    "OneBitLamb": _ONE_BIT,
    "Lamb": "it needs the norm of each layer, and from stage 1 on a rank holds flat pieces of layers",
    "Lion": "it is not here yet",
    "Muon": "it looks at whole matrices, and from stage 1 on a rank holds flat pieces of them",
    "Adafactor": "it looks at rows and columns of matrices, and from stage 1 on a rank holds flat pieces of them",
    "LBFGS": "it computes gradients several times in a step, and here the script does, once",
    "SparseAdam": "it needs sparse gradients, and they are dense here",
    "MuAdam": _MUP,
    "MuAdamW": _MUP,
    "MuSGD": _MUP,
}


def read_optimizer(one: Given, given: Mapping[str, Given], *, any_of_torch: bool) -> tuple[str, Sifted]:
    """Return an optimizer's name (for "Adam" what it means) and its settings, by their dotted names.

    any_of_torch  whether torch's optimizers need no word more
    """
    refused = choice(*NOT_MADE).read(one.value)
    if refused is not MISFIT:
        what = f'"{one.name}" is {shown(one.value)}: {NOT_MADE[refused]}'
        raise DeepSpeedConfigError(what, fix=typed("optimizer.type", "AdamW"))
    name = read_value(one.name, one.value, choice(*OPTIMIZERS), "AdamW")
    settings = OPTIMIZERS[name]
    if settings is None:
        if not any_of_torch:
            what = f'"{one.name}" is {shown(one.value)}, which no test here compares under ZeRO with itself at stage 0'
            raise DeepSpeedConfigError(what, fix=typed("zero_allow_untested_optimizer", True))
        names = [key.removeprefix(OPTIMIZER) for key in given]
        settings = {key: {**_NEVER, "lr": _LR}.get(key, _TORCH) for key in names}
    sifted = sift_settings(name, settings, given, OPTIMIZER)
    return _as_adam(name, sifted) if settings is ADAM else (name, sifted)


def sift_settings(of: str, settings: Mapping[str, Key], given: Mapping[str, Given], prefix: str) -> Sifted:
    """Return what given settings come to.  Raises DeepSpeedConfigError as `sift` does, or for an unknown one"""
    table = {prefix + name: key for name, key in settings.items()}
    for dotted, one in given.items():
        if dotted not in table:
            close = nearest(dotted.removeprefix(prefix), settings)
            fix = typed(prefix + close, example(settings[close])) if close else ", ".join(settings)
            raise DeepSpeedConfigError(f'"{one.name}" is no setting of {of}', fix=fix)
    return sift(table, given)


def _as_adam(name: str, sifted: Sifted) -> tuple[str, Sifted]:
    """Say which Adam is meant, and leave the settings that both have."""
    values, origins, notes = dict(sifted.values), dict(sifted.origins), list(sifted.notes)
    mode, torch_adam, decay = (f"{OPTIMIZER}{name}" for name in ("adam_w_mode", "torch_adam", "weight_decay"))
    decoupled = name == "AdamW" or values[mode]
    if values[torch_adam] and decoupled and origins[decay] == "default":
        values[decay], origins[decay] = 0.01, f"derived from {torch_adam}"
    if name == "AdamW" and not values[mode]:
        notes.append(f"{mode}: no effect here, AdamW's decay always acts on weights")
    if name == "Adam" and decoupled and values[decay] and origins[mode] == "default":
        notes.append(f'optimizer.type: "Adam" is AdamW, as in DeepSpeed, unless "{mode}" is false')
    for key in (mode, torch_adam):
        del values[key], origins[key]
    return "AdamW" if decoupled else "Adam", Sifted(values=values, origins=origins, notes=notes)


def schedule_keys(name: str) -> dict[str, Key]:
    """Return the settings of a schedule, from its class."""
    kind = SCHEDULES[name]
    hints = get_type_hints(kind)
    return {one.name: Key(_type_of(one, hints[one.name]), one.default, HONOURED, "") for one in fields(kind)}


def _type_of(setting: "Field[Any]", hint: Any) -> Type:
    """Return what a schedule's setting must be: sizes are 1 or more, counts of stairs and intervals 0 or more."""
    inner = [_type_of(setting, kind) for kind in get_args(hint) if kind is not NoneType]
    if inner:
        return maybe(*inner)
    size = COUNT if setting.default == 0 or setting.name.endswith("stair_count") else ONE_OR_MORE
    return {int: size, float: number(), bool: BOOLEAN, str: choice("log", "linear")}[hint]


def read_scheduler(one: Given, given: Mapping[str, Given], *, lr: float | None) -> tuple[str, Sifted]:
    """Return a schedule's name and its settings, by their dotted names.

    lr  of the optimizer: what WarmupLR, and no other, rises to that is given nothing else. Where it is not known here
        either, warmup_max_lr is left out
    """
    name = read_value(one.name, one.value, choice(*SCHEDULES), None)
    sifted = sift_settings(name, schedule_keys(name), given, SCHEDULER)
    values, origins, top = dict(sifted.values), dict(sifted.origins), f"{SCHEDULER}warmup_max_lr"
    if name == "WarmupLR" and origins.get(top) == "default":
        del values[top], origins[top]
        values |= {} if lr is None else {top: lr}
        origins |= {} if lr is None else {top: f"derived from {OPTIMIZER}lr"}
    return name, Sifted(values=values, origins=origins, notes=sifted.notes)
