"""Models that are born in pieces, with DeepSpeed's arguments: `deepspeed.zero.Init`, and looking at the pieces.

    with zero.Init():                                        on all ranks of this thread's world
        model = Model()
    with zero.GatheredParameters(model.parameters()):        whole for a while

What is done is `minispeed/zero/init.py`; here stand the arguments that it has no use for, and where the group comes
from. Values are rank 0's, and stay in the dtype they were made in: rounding for the computation is the engine's, whose
masters start from the unrounded weights. (DeepSpeed rounds in `Init`.)

https://deepspeed.readthedocs.io/en/latest/zero3.html
"""

import contextlib
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from minispeed.deepspeed.devices import Born
from minispeed.deepspeed.groups import AnyGroup, group_of
from minispeed.deepspeed.start import init_distributed
from minispeed.zero import init as pieces


class Init:
    """Cut every parameter that a module gets inside `with Init():` into one part for each rank."""

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: AnyGroup = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: AnyGroup = None,
        param_swapper: Any = None,
        tensor_overrides: Any = None,
    ) -> None:
        """Choose the ranks; starts them where nobody has (`init_distributed`).

        module               a model that exists: its parameters are cut at once
        data_parallel_group  the ranks; None: those of `sequence_data_parallel_group`, of `mpu`, else all
        dtype                of floating-point parameters that name none themselves
        enabled              False: nothing is done
        The others are accepted and mean nothing here: what is in pieces is where it was made until the engine moves
        it, a configuration is the engine's, and nothing is quantized.
        """
        self._enabled, self._dtype = enabled, dtype
        self._open: list[contextlib.ExitStack] = []
        if not enabled:
            return
        init_distributed()
        group = data_parallel_group or sequence_data_parallel_group
        if group is None and mpu is not None:
            group = mpu.get_data_parallel_group()
        self._group = group_of(group)
        if module is not None:
            with self:
                _register_again(module)

    def __enter__(self) -> "Init":
        stack = contextlib.ExitStack()
        if self._enabled:
            if self._dtype is not None:
                stack.enter_context(Born(self._dtype))
            stack.enter_context(pieces.Init(self._group))
        self._open.append(stack)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.pop().__exit__(kind, error, trace)


def GatheredParameters(  # noqa: N802 DeepSpeed's name
    params: Iterable[Any] | nn.Parameter | nn.Module,
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> contextlib.AbstractContextManager[None]:
    """Make parameters whole on every rank inside this; every rank enters it, with the same ones.

    params         parameters; or a module, a dict, or named parameters
    modifier_rank  whose changes count, for all ranks; None: they are only looked at
    fwd_module     means nothing here: a parameter is found wherever it is used
    Raises         UserError if a parameter was changed in place and no modifier_rank given
    """
    if isinstance(params, nn.Module):
        params = params.parameters()
    elif isinstance(params, Mapping):
        params = params.values()
    if not isinstance(params, torch.Tensor):
        params = [p[1] if isinstance(p, tuple) else p for p in params]
    return pieces.GatheredParameters(params, modifier_rank, enabled=enabled)


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Say that a module's forward uses another's parameter: which stage 3 here finds out by itself.

    Raises  RuntimeError, as DeepSpeed does, if it is no parameter
    """
    if not isinstance(parameter, nn.Parameter):
        raise RuntimeError(f"{type(parameter).__name__} is no torch.nn.Parameter")


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Take `register_external_parameter` back."""
    register_external_parameter(module, parameter)


def _register_again(module: nn.Module) -> None:
    """Give every module its parameters once more, as its constructor did: inside an Init that cuts them."""
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            part.register_parameter(name, p)
