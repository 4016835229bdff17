"""The engine of a `PipelineModule`: a whole step at a time, with DeepSpeed's calls.

    loss = engine.train_batch(data_iter)      one update from gradient_accumulation_steps micro-batches
    loss = engine.eval_batch(data_iter)       the same forward alone

`data_iter` gives (inputs, labels), each a tensor or a tuple of some; the ranks of the first stage read the inputs,
those of the last the labels, and the others nothing. The loss is DeepSpeed's: the mean over micro-batches and
data-parallel ranks of what `loss_fn` returns for each, on every rank.

Every stage of ZeRO is allowed. (DeepSpeed refuses 2 and 3, for what they cost: gradients are summed over ranks at every
micro-batch in place of once a step, and at stage 3 parameters gathered for each forward and backward of each.)

https://deepspeed.readthedocs.io/en/latest/pipeline.html
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from minispeed.axes import Layout
from minispeed.collective.numbers import any_of, sums_of
from minispeed.collective.trace import Trace
from minispeed.collective.world import World
from minispeed.config import Config
from minispeed.deepspeed import pipe_state
from minispeed.deepspeed.engine import DeepSpeedEngine
from minispeed.deepspeed.grid import Grid
from minispeed.deepspeed.loader import RepeatingLoader
from minispeed.deepspeed.pipe import PipelineModule
from minispeed.deepspeed.pipe_batches import MicroBatch, read_batches
from minispeed.deepspeed.pipe_layers import PipelineError
from minispeed.engine import Engine
from minispeed.errors import UserError
from minispeed.pipeline.actions import Program
from minispeed.pipeline.bundle import Bundle
from minispeed.pipeline.execute import execute
from minispeed.pipeline.messages import forward_only
from minispeed.pipeline.stage import Stage
from minispeed.runner import Reducing

TIMED = {"F": "forward", "B": "backward", "BI": "backward", "BW": "backward"}


class PipelineEngine(DeepSpeedEngine):
    """One stage of a model that trains itself together with the ranks that have the others.

    stage_id       mine, from 0
    grid           where this rank stands, and its groups
    data_iterator  what is read where `train_batch` is given nothing
    batch_fn       what is called with whatever it gives, before that is taken for (inputs, labels)
    """

    module: PipelineModule

    def __init__(self, module: PipelineModule, world: World, config: Config, core: Engine | None, trace: Trace) -> None:
        """Take a module that `core` has cut.  Raises UserError without an optimizer"""
        super().__init__(module, world, config, core, trace)
        self.lines = self._trained().lines
        self.grid = Grid(self.lines, module.topology())
        self.stage_id, self.is_pipe_parallel = self.lines.pp.rank, self.lines.pp.size > 1
        self.data_iterator: Iterator[Any] | None = None
        self.batch_fn: Callable[[Any], Any] | None = None
        self._boundary = False

    def is_first_stage(self) -> bool:
        """Return whether my stage reads the inputs."""
        return self.stage_id == 0

    def is_last_stage(self) -> bool:
        """Return whether my stage reads the labels and has the losses."""
        return self.stage_id == self.lines.pp.size - 1

    @property
    def reads(self) -> bool:
        """Return whether my stage reads anything."""
        return self.is_first_stage() or self.is_last_stage()

    # ---- rows

    def set_dataloader(self, loader: Any) -> None:
        """Read from a loader from now on, of this rank's own rows; `RepeatingLoader` makes one that never ends."""
        if self.reads:
            self.training_dataloader, self.data_iterator = loader, iter(loader)

    def set_dataiterator(self, iterator: Iterator[Any] | None) -> None:
        """Read from an iterator from now on."""
        if self.reads:
            self.training_dataloader, self.data_iterator = None, iterator

    def read_in_order(self, loader: DataLoader[Any]) -> None:
        """Read a dataset's rows in its own order, over and over, as DeepSpeed's pipelines do."""
        assert isinstance(loader.sampler, DistributedSampler)
        loader.sampler.shuffle = False
        self.training_dataloader = None
        self.set_dataloader(RepeatingLoader(loader))

    def set_batch_fn(self, fn: Callable[[Any], Any] | None) -> None:
        """Call a function with whatever is read, which returns (inputs, labels)."""
        self.batch_fn = fn

    def _read(self, number: int) -> list[MicroBatch]:
        """Return the micro-batches of a step, of which ranks that read nothing have none.  Raises on every rank"""
        error, batches = None, [MicroBatch(None, None)] * number
        try:
            if self.reads:
                batches = read_batches(self.data_iterator, number, self.batch_fn)
        except UserError as failure:
            error = failure
        if any_of(self.lines.world, error is not None):
            raise error or UserError("another rank could not read its micro-batches", fix="see that rank's message")
        return batches

    # ---- steps

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Make one update; every rank calls this.

        data_iter  is read from now on; None: goes on with what was
        Returns    the mean loss, the same on every rank
        Raises     UserError if an iterator ends early, gives no pair, or a loss is not one number
        """
        if not torch.is_grad_enabled():
            raise PipelineError("train_batch without gradients", fix="eval_batch, or leaving torch.no_grad")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self.module.train()
        self.tput_timer.start()
        batches = self._read(self.config.batch.accumulation)
        losses = [loss for loss, _ in self._run(batches, with_loss=True, is_training=True)]
        mean = self._mean(losses, len(batches))
        self._reporter.saw(mean)
        self._update()
        self.micro_steps += len(batches)
        self.tput_timer.stop(global_step=True)
        self._report()
        return mean

    def eval_batch(
        self,
        data_iter: Iterator[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Run forward alone, in evaluation mode; every rank calls this.

        return_logits      return (that, output) with the last layer's output of the last micro-batch; None on other
                           stages than the last
        compute_loss       False: in place of losses what the last layer returned
        reduce_output      "avg": the mean over micro-batches and data-parallel ranks; None: a list of this rank's
        bcast_loss         a mean loss is returned on every rank; else, as all that is no mean loss, on the last stage
                           alone, and None elsewhere
        num_micro_batches  how many; None: as many as a step has
        """
        if reduce_output not in ("avg", None):
            raise UserError(f"reduce_output is {reduce_output!r}", fix='"avg", or None')
        self.module.eval()
        kept = self.training_dataloader, self.data_iterator
        self.set_dataiterator(data_iter)
        try:
            batches = self._read(num_micro_batches or self.config.batch.accumulation)
        finally:
            self.training_dataloader, self.data_iterator = kept
        ran = self._run(batches, with_loss=compute_loss, is_training=False)
        found = self._reduced([loss for loss, _ in ran], reduce_output, compute_loss and bcast_loss, len(batches))
        return (found, ran[-1][1] if ran else None) if return_logits else found

    def _run(self, batches: Sequence[MicroBatch], *, with_loss: bool, is_training: bool) -> list[tuple[Any, Any]]:
        """Run micro-batches through the stages, backward too if they are trained on.

        Returns  (loss, output) of each, on the last stage; nothing elsewhere
        """
        core = self._trained()
        (part,) = core.parts
        fp16 = self.config.fp16
        ran: dict[int, tuple[Any, Any]] = {}

        def run(bundle: Bundle, micro: int) -> Bundle:
            inputs, labels = batches[micro].to(self.device, halve=fp16.enabled and fp16.auto_cast)
            made = part.run(bundle, inputs, labels, with_loss)
            if not self.is_last_stage():
                return made
            loss, output = made
            if with_loss:
                _check_loss(loss)
            ran[micro] = _detached(loss), None if is_training else _detached(output)
            return (loss,) if is_training else ()

        stage = Stage(
            run=run,
            loss=lambda outputs, micro: outputs[0] * core.scaler.scale,
            backward=Reducing(part.sharded, len(batches)),
        )
        programs = programs_of(core.layout, len(batches), is_training)
        timeline = execute(programs, {part.stage: stage}, self.lines.pp, device=self.device)
        if self.config.wall_clock_breakdown:
            for event in timeline.events:
                if event.action.kind in TIMED:
                    self.timers(TIMED[event.action.kind]).add(float(event.end - event.start))
        return [ran[micro] for micro in sorted(ran)]

    def _update(self) -> None:
        """Make the update from the gradients that are there."""
        assert self.optimizer is not None
        self._boundary = True
        with self._reporter.timed("step"):
            self.optimizer.step()  # not `_make_update` itself: torch's schedulers listen to it
            self._finish({})
        self._boundary = False

    # ---- losses

    def _mean(self, losses: Sequence[Tensor], micros: int) -> Tensor:
        """Return the mean over micro-batches and data-parallel ranks, on every rank, in fp32 (fp64 of fp64)."""
        mine = sum(loss.double().sum().item() for loss in losses)
        mean = sums_of(self.lines.world, [mine]).item() / (micros * self.lines.dp.size)
        dtype = torch.promote_types(self._trained().precision.compute, torch.float32)
        return torch.tensor(mean, dtype=dtype, device=self.device)

    def _reduced(self, found: Sequence[Any], how: str | None, is_everyones: bool, micros: int) -> Any:
        """Return what `eval_batch` does of the last stage's losses or outputs."""
        if how is None:
            return list(found) if self.is_last_stage() else None
        if is_everyones:
            return self._mean(found, micros)
        if not self.is_last_stage():
            return None
        if isinstance(found[0], Tensor):
            return self._mean_over_replicas(found)
        return [self._mean_over_replicas(each) for each in zip(*found)]

    def _mean_over_replicas(self, found: Sequence[Tensor]) -> Tensor:
        mean = (torch.stack(list(found)).sum(0) / (len(found) * self.lines.dp.size)).contiguous()
        self.lines.dp.all_reduce(mean).wait()
        return mean

    # ---- the whole model, on disk or in memory: see `minispeed.deepspeed.pipe_state`

    save_checkpoint = pipe_state.save_checkpoint
    module_state_dict = pipe_state.module_state_dict
    load_module_state_dict = pipe_state.load_module_state_dict

    # ---- what a pipeline does by itself

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise PipelineError: a pipeline's forwards and backwards are those of its schedule."""
        raise PipelineError("forward, backward or step of a pipeline by themselves", fix="train_batch or eval_batch")

    forward = backward = step = scale = no_sync = set_gradient_accumulation_boundary = _refuse


@lru_cache(maxsize=64)
def programs_of(layout: Layout, micros: int, is_training: bool) -> list[Program]:
    """Return what each rank of a pipeline does."""
    programs = layout.programs(micros)
    return programs if is_training else forward_only(programs)


def _check_loss(loss: Any) -> None:
    """Raise UserError unless a loss is one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"the type {type(loss).__name__}"
        what = f"a loss of {found}, not one number"
        raise UserError(what, fix="PipelineModule(..., loss_fn=...) that returns a mean")


def _detached(x: Any) -> Any:
    """Return tensors without their graph."""
    if isinstance(x, Tensor):
        return x.detach()
    return type(x)(map(_detached, x)) if isinstance(x, (tuple, list)) else x
