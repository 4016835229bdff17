"""DeepSpeed's engine calls, on `minispeed.engine.Engine`.

    loss = engine(batch)      the module's forward
    engine.backward(loss)     gradients of one micro-batch; on a step's last one, summed over ranks
    engine.step()             counts a micro-batch; after a step's last one, the update

The caller's loss is a mean over the rows of one micro-batch on one rank. So the step's gradient is a mean of means:
their sum over micro-batches and ranks, divided once at the update by accumulation x ranks. Where micro-batches hold
unequal numbers of supervised tokens that is not the mean over all tokens, which `Engine.train_step` computes.

`loss.backward()` by the caller does as `engine.backward(loss)`; with fp16 it must be `engine.scale(loss).backward()`.

https://deepspeed.readthedocs.io/en/latest/training.html
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from minispeed.collective.trace import Trace
from minispeed.collective.world import World
from minispeed.config import Config
from minispeed.deepspeed import saving
from minispeed.deepspeed.answers import Answers
from minispeed.deepspeed.fragments import register
from minispeed.deepspeed.optimizer import EngineOptimizer
from minispeed.deepspeed.reporter import Reporter
from minispeed.deepspeed.slices import Slices
from minispeed.deepspeed.zero_grad import ZeroGrad
from minispeed.engine import Engine
from minispeed.errors import UserError


class DeepSpeedEngine(Answers):
    """A module that trains itself; what is not here, nor among the answers, is the module's."""

    def __init__(self, module: nn.Module, world: World, config: Config, core: Engine | None, trace: Trace) -> None:
        """Take a module whose parameters `core` has taken over; None where there is no optimizer."""
        super().__init__(config, core)
        self.module, self.world = module, world
        self.device, self.local_rank = world.device, world.device.index or 0
        self.global_rank, self.world_size = world.rank, world.size
        self.optimizer = (
            None if core is None else EngineOptimizer(core, step=self._make_update, zero_grad=self.zero_grad)
        )
        self.lr_scheduler: Any = None
        self.training_dataloader: Any = None
        self._boundary: bool | None = None  # what the caller says of the accumulation's boundary, instead of a count
        self._is_synchronised = True
        self._num_used = self._num_scaled = 0  # backwards that steps have used, and those since with a scaled loss
        self._reporter = Reporter(config, world, trace)
        self.timers, self.tput_timer = self._reporter.timers, self._reporter.throughput
        self.monitor = self._reporter.monitor
        self._slices = Slices(module, core)
        if core is not None:
            register(core)
            module.zero_grad = ZeroGrad(self)  # type: ignore[method-assign]
            core.optimizer.zero_grad = ZeroGrad(self)  # type: ignore[method-assign]
        self._expect()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    # ---- a micro-batch

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the module."""
        if self.training:
            self.tput_timer.start()
        if self.config.fp16.enabled and self.config.fp16.auto_cast:
            inputs, kwargs = _cast(inputs), _cast(kwargs)
        with self._reporter.timed("forward"):
            return self.module(*inputs, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Run the backward of one micro-batch.

        loss           one number, a mean over this rank's rows
        scale_wrt_gas  False: the caller has divided by the accumulation already
        Returns        the loss, divided by the accumulation unless `scale_wrt_gas` is False
        Raises         UserError on a loss that is not one number, or a second backward through one forward
        """
        core, accumulation = self._trained(), self.config.batch.accumulation
        if not isinstance(loss, Tensor):
            raise UserError(f"backward got {type(loss).__name__}, not a loss", fix="engine.backward(loss_1 + loss_2)")
        scaled = loss * (core.scaler.scale * (1 if scale_wrt_gas else accumulation))
        self._num_scaled += 1
        with self._reporter.timed("backward"):
            try:
                core.sharded.backward(scaled, last=core.sharded.reduction.is_last, retain_graph=retain_graph)
            except RuntimeError as error:
                if "second time" not in str(error):
                    raise
                what = "backward a second time through one forward, whose saved tensors are gone"
                raise UserError(what, fix="one backward of the sum of the losses, or retain_graph=True") from error
        self._reporter.saw(loss)
        return loss / accumulation if scale_wrt_gas else loss

    def scale(self, loss: Tensor) -> Tensor:
        """Return a loss to call `.backward()` on: times the loss scale."""
        self._num_scaled += 1
        return loss * self._trained().scaler.scale

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """End a micro-batch, and after a step's last one make the update.

        lr_kwargs  for the schedule's `step`
        Raises     UserError inside `no_sync`, or if there was no backward
        """
        if not self._is_synchronised:
            raise UserError("step inside no_sync, where gradients are not summed over ranks", fix="step after it")
        is_boundary = self.is_gradient_accumulation_boundary()
        with self._reporter.timed("step"):
            self._use_gradients()
            if is_boundary:
                assert self.optimizer is not None
                self.optimizer.step()  # not `_make_update` itself: torch's schedulers listen to it
                self._finish(lr_kwargs or {})
        self.micro_steps += 1
        self._expect()
        self.tput_timer.stop(global_step=is_boundary, report_speed=is_boundary)
        if is_boundary:
            self._report()

    def _use_gradients(self) -> None:
        """Make sure that a step has gradients, and that they are what the caller means."""
        core = self._trained()
        num_backwards = core.sharded.num_backwards - self._num_used
        num_unscaled = num_backwards - self._num_scaled
        by_hand = [p for p in self.module.parameters() if p.grad is not None]
        if num_unscaled > 0 and core.scaler.scale != 1:
            what = f"a backward of a loss that was not multiplied by the loss scale, {core.scaler.scale:g}"
            raise UserError(what, fix="engine.backward(loss), or engine.scale(loss).backward()")
        if num_backwards and by_hand:
            what = "a gradient was set after the backward, which has summed the others over the ranks already"
            raise UserError(what, fix="safe_set_full_grad(parameter, value)")
        if by_hand:
            with self.gathered():  # a released parameter takes no gradient
                for p in by_hand:
                    assert p.grad is not None
                    p.grad = p.grad * (core.scaler.scale * self.config.batch.accumulation)  # what a step divides by
            core.sharded.reduce_now()
        elif not num_backwards:
            raise UserError("step, and no backward before it", fix="engine.backward(loss) first")
        elif self.is_gradient_accumulation_boundary() and any(unit.full is not None for unit in core.sharded.units):
            core.sharded.reduce_now()  # the boundary was told after the backward
        self._forget_counts()

    def _make_update(self) -> None:
        self._norm = self._trained().update()

    def _finish(self, lr_kwargs: Mapping[str, Any]) -> None:
        """Move the schedule and the counts on after an update."""
        if self._trained().skipped:
            self.skipped_steps += 1
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)
        self.global_steps += 1
        self.global_samples += self.config.batch.train

    def _report(self) -> None:
        scale = self._trained().scaler.scale
        counts = (self.global_steps, self.global_samples)
        self._reporter.report(*counts, skipped=self.skipped_steps, lr=self.get_lr(), mom=self.get_mom(), scale=scale)

    # ---- accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the present micro-batch is a step's last one."""
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps + 1) % self.config.batch.accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the micro-batches from now on are last ones, in place of a count of `step`s."""
        self._boundary = is_boundary
        self._expect()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave gradients unsummed over ranks inside this: they are added up on each until a backward outside.

        Raises  UserError at stages 2 and 3, which keep no whole gradients, and inside another
        """
        if self.config.zero.stage >= 2:
            what = f"no_sync at ZeRO stage {self.config.zero.stage}, which sums gradients as soon as it has them"
            raise UserError(what, fix="stage 0 or 1")
        if not self._is_synchronised:
            raise UserError("no_sync inside no_sync", fix="one of them")
        self._is_synchronised = False
        self._expect()
        try:
            yield
        finally:
            self._is_synchronised = True
            self._expect()

    def _expect(self) -> None:
        """Tell the units whether the next backward is a step's last one, whoever calls it."""
        if self.core is not None:
            is_last = self.is_gradient_accumulation_boundary() and self._is_synchronised
            self.core.sharded.reduction.is_last = is_last

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients of this step."""
        self._trained().sharded.forget()
        self._forget_counts()

    def _forget_counts(self) -> None:
        self._num_used, self._num_scaled = self._trained().sharded.num_backwards, 0

    # ---- parameters, whole

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Make all parameters whole on every rank inside this."""
        with nullcontext() if self.core is None else self.core.sharded.gathered():
            yield self.module

    def module_state_dict(
        self,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Any]:
        """Return the module's parameters and buffers, whole, on every rank."""
        with self.gathered(), self._slices.readable():
            found: dict[str, Any] = {} if destination is None else destination
            self.module.state_dict(destination=found, prefix=prefix, keep_vars=keep_vars)
            self._slices.join(found, prefix)
        if exclude_frozen_parameters:
            for name, p in self.module.named_parameters():
                if not p.requires_grad:
                    found.pop(prefix + name, None)
        return found

    def load_module_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Replace parameters and buffers; rank 0's values count. The masters follow."""
        with self.gathered():
            self.module.load_state_dict(self._slices.cut(state_dict), strict=strict)
            for unit in () if self.core is None else self.core.sharded.units:
                unit.take(0)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the module's state, whole, under the names "module.NAME"."""
        return self.module_state_dict(prefix="module.")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **_: Any) -> None:  # type: ignore[override]
        """Replace the module's state by one that `state_dict` or `module_state_dict` returned."""
        self.load_module_state_dict({key.removeprefix("module."): x for key, x in state_dict.items()}, strict)

    def empty_partition_cache(self) -> None:
        """Release whatever parameters are whole and need not be."""
        for unit in () if self.core is None else self.core.sharded.units:
            unit.at("after forward")

    def destroy(self) -> None:
        """Give the module back as an ordinary one, whole but for layers that are cut by width."""
        if self.core is not None:
            self.core.sharded.dissolve()
            del self.module.zero_grad
        self.core = self.optimizer = None

    # ---- on disk: see `minispeed.deepspeed.saving`

    save_checkpoint = saving.save_checkpoint
    load_checkpoint = saving.load_checkpoint
    save_16bit_model = saving.save_16bit_model


def _cast(value: Any) -> Any:
    """Return nested inputs with fp16 in place of fp32."""
    if isinstance(value, Tensor):
        return value.to(torch.float16) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(_cast, value))
    return {key: _cast(one) for key, one in value.items()} if isinstance(value, dict) else value
