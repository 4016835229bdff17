"""A model as a list of layers, for a pipeline to cut, with DeepSpeed's names.

    net = PipelineModule(
        layers=[TiedLayerSpec("words", nn.Embedding, 50, 8), LayerSpec(Block, 8), torch.tanh,
                TiedLayerSpec("words", nn.Embedding, 50, 8, forward_fn=lambda words, x: x @ words.weight.T)],
        num_stages=2, loss_fn=cross_entropy)
    engine, _, _, _ = minispeed.initialize(model=net, config=...)

A layer is called with what the one before returned: a tensor, or a tuple of tensors as one argument. Every rank builds
all layers, in order and on the CPU; when the engine is made it takes rank 0's values and keeps its stage. So a run does
not depend on the number of stages. In DeepSpeed a rank builds its own layers alone, with values that depend on it.

https://deepspeed.readthedocs.io/en/latest/pipeline.html
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from minispeed.collective.world import current_world
from minispeed.cut import Link
from minispeed.deepspeed.checkpointing import checkpoint
from minispeed.deepspeed.logging import set_random_seed
from minispeed.deepspeed.pipe_batches import map_tensors
from minispeed.deepspeed.pipe_chunk import LayerChunk
from minispeed.deepspeed.pipe_layers import Layer, LayerSpec, TiedLayerSpec
from minispeed.deepspeed.topology import PipeDataParallelTopology, ProcessTopology
from minispeed.errors import UserError
from minispeed.pipeline.partition import partition
from minispeed.zero.absent import owner_of


class PipelineModule(nn.Module):
    """A chain of layers, which `initialize` cuts between some of them.

    parts   b[0] = 0, ..., b[stages] = number of layers: stage s has those from b[s] to b[s + 1]
    A layer's parameters are called "INDEX.NAME", those of tied ones "tied_modules.KEY.NAME". After `initialize` those
    of other stages have no elements.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] = checkpoint,
        checkpointable_layers: Sequence[str] | None = None,
        dynamic_shape: bool = False,
    ) -> None:
        """Build the layers, and decide where the stages end.

        layers                          modules, LayerSpecs, TiedLayerSpecs and functions
        num_stages                      ranks that share the model; `topology` may say it by the length of "pipe"
        loss_fn                         (last layer's output, labels) -> one number; None: the output is the loss
        seed_layers                     `seed_fn(base_seed + index)` before a layer is built, and before each of its
                                        forwards a number of that forward: random numbers do not depend on the stages
        partition_method                "parameters": trainable ones, "uniform": layers, or "type:REGEX": layers whose
                                        class has that in its name, in any case; the stage with most has the fewest
                                        that can be
        activation_checkpoint_interval  layers that are recomputed together, counted from the stage's first; 0: none are
        activation_checkpoint_func      recomputes: (function, *tensors) -> what the function returns
        checkpointable_layers           classes of which all of them must be; None: one of them has parameters
        dynamic_shape                   means nothing here: shapes may change from step to step, and not inside one
        Raises                          UserError on what is no layer, on more stages than layers, on a REGEX that
                                        matches nothing, or on a stage in which nothing is trained
        """
        super().__init__()
        if num_stages is None and topology is None:
            raise UserError("PipelineModule without a number of stages", fix="num_stages=, or topology=")
        self.num_stages = topology.get_dim("pipe") if topology is not None else num_stages or 0
        self.seed_layers, self.seed_fn, self.base_seed = seed_layers, seed_fn or set_random_seed, base_seed
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self.activation_checkpoint_func = activation_checkpoint_func
        self.checkpointable_layers = checkpointable_layers
        self.micro_offset = 0  # forwards so far
        self._topology = topology
        self.tied_modules = nn.ModuleDict()
        self.layers = [self._build(index, spec) for index, spec in enumerate(layers)]
        self.loss_fn = loss_fn
        self.costs = self._costs(partition_method)
        self.parts = partition(self.costs, self.num_stages)
        self._check_stages()
        self.shapes: Mapping[str, tuple[int, ...]] = {}  # of all parameters, before any is given up

    def _build(self, index: int, spec: Any) -> Layer:
        """Return a layer; its module becomes one of mine."""
        if self.seed_layers:
            self.seed_fn(self.base_seed + index)
        if isinstance(spec, PipelineModule):
            raise UserError(f"layer {index} is a PipelineModule", fix="its layers, one by one")
        if isinstance(spec, TiedLayerSpec):
            return self._build_tied(index, spec)
        if isinstance(spec, (LayerSpec, nn.Module)):
            module = spec.build() if isinstance(spec, LayerSpec) else spec
            self.add_module(str(index), module)
            return Layer(type(module).__name__, module, str(index), module)
        if not callable(spec):
            what = f"layer {index} is a {type(spec).__name__}"
            raise UserError(what, fix="a module, a LayerSpec, or a function of what the layer before returned")
        return Layer(getattr(spec, "__name__", type(spec).__name__), spec)

    def _build_tied(self, index: int, spec: TiedLayerSpec) -> Layer:
        if spec.key not in self.tied_modules:
            self.tied_modules[spec.key] = spec.build()
        module = self.tied_modules[spec.key]
        for name in spec.tied_weight_attr:
            try:
                attrgetter(name)(module)
            except AttributeError:
                what = f"layer {index} ties {name!r}, which a {type(module).__name__} has not"
                raise UserError(
                    what, fix=f"tied_weight_attr= one of {[n for n, _ in module.named_parameters()]}"
                ) from None
        call = module if spec.forward_fn is None else partial(spec.forward_fn, module)
        return Layer(spec.typename.__name__, call, f"tied_modules.{spec.key}", module)

    # ---- where it is cut

    def _costs(self, method: str) -> list[int]:
        """Return what each layer counts."""
        name, _, pattern = method.partition(":")
        if name.lower() == "parameters":
            return [sum(p.numel() for p in layer.parameters if p.requires_grad) for layer in self.layers]
        if name.lower() == "uniform":
            return [1] * len(self.layers)
        if name.lower() != "type":
            raise UserError(f"partition_method is {method!r}", fix='"parameters", "uniform" or "type:REGEX"')
        found = [int(bool(re.search(pattern, layer.kind, re.IGNORECASE))) for layer in self.layers]
        if not any(found):
            known = ", ".join(dict.fromkeys(layer.kind for layer in self.layers))
            raise UserError(f"partition_method {method!r} matches none of the layers", fix=f"one of {known}")
        return found

    def _check_stages(self) -> None:
        """Raise UserError where a stage has nothing to train: each has an optimizer."""
        for stage, (first, last) in enumerate(zip(self.parts, self.parts[1:])):
            if not any(p.requires_grad for layer in self.layers[first:last] for p in layer.parameters):
                kinds = ", ".join(layer.kind for layer in self.layers[first:last])
                what = f"stage {stage} of {self.num_stages} would have layers {first} to {last - 1} ({kinds})"
                fix = 'fewer stages, or partition_method="parameters"'
                raise UserError(f"{what}, in which nothing is trained", fix=fix)

    def link(self, first: int, last: int) -> Link:
        """Return layers first .. last - 1 on this rank's device, which from then on are trained.

        Raises  UserError if a parameter is in no layer, or was born in pieces
        """
        users: dict[nn.Parameter, int] = {}
        for index, layer in enumerate(self.layers):
            for p in layer.parameters:
                users.setdefault(p, index)
        of_loss = self.loss_fn.parameters() if isinstance(self.loss_fn, nn.Module) else ()
        users |= {p: len(self.layers) - 1 for p in of_loss if p not in users}
        names = {p: name for name, p in self.named_parameters()}
        for name in (name for p, name in names.items() if p not in users):
            raise UserError(f"{name} is in no layer, so it would be on no stage", fix="a module of the list")
        if any(owner_of(p) is not None for p in names):
            raise UserError("a PipelineModule inside zero.Init", fix="building it outside: its stage alone is kept")
        self.shapes = {name: tuple(p.shape) for p, name in names.items()}
        chunk = LayerChunk(self, first, last).to(current_world().device)
        here = {local: names[p] for local, p in chunk.named_parameters()}
        return Link(chunk, here, [local for local, p in chunk.named_parameters() if users[p] < first])

    def partitions(self) -> list[int]:
        """Return `parts`."""
        return self.parts

    def stage_owner(self, layer_idx: int) -> int:
        """Return the stage that a layer is in."""
        return next(stage for stage, end in enumerate(self.parts[1:]) if layer_idx < end)

    def buffers_by_stage(self) -> Iterator[tuple[int, Tensor]]:
        """Yield every buffer, with the first stage that uses it."""
        loss = list(self.loss_fn.buffers()) if isinstance(self.loss_fn, nn.Module) else []
        seen: set[Tensor] = set()
        modules = ((index, layer.module) for index, layer in enumerate(self.layers) if layer.module is not None)
        found = [(self.stage_owner(index), buffer) for index, module in modules for buffer in module.buffers()]
        for stage, buffer in [*found, *((self.num_stages - 1, buffer) for buffer in loss)]:
            if buffer not in seen:
                yield stage, buffer
            seen.add(buffer)

    def num_pipeline_stages(self) -> int:
        """Return the number of stages."""
        return self.num_stages

    def topology(self) -> ProcessTopology:
        """Return where the ranks of this thread's world stand."""
        return self._topology or PipeDataParallelTopology(self.num_stages, current_world().size // self.num_stages)

    # ---- running

    def forward(self, inputs: Any) -> Any:
        """Run all layers; before `initialize`, or where there is one stage."""
        return self.run_layers(0, len(self.layers), inputs)

    def run_layers(self, first: int, last: int, x: Any) -> Any:
        """Run layers first .. last - 1."""
        self.micro_offset += 1
        every = self.activation_checkpoint_interval or last - first
        for begin in range(first, last, every):
            run = partial(self._run, begin, min(begin + every, last), self.micro_offset)
            if self.activation_checkpoint_interval and self._is_checkpointable(self.layers[begin : begin + every]):
                x = self._recomputed(run, x)
            else:
                x = run(x)
        return x

    def _run(self, first: int, last: int, micro: int, x: Any) -> Any:
        for index in range(first, last):
            if self.seed_layers:
                self.seed_fn(self.base_seed * (micro + 1) + index)
            x = self.layers[index].call(x)
        return x

    def _recomputed(self, run: Callable[[Any], Any], x: Any) -> Any:
        """Return run(x), of which only x is kept, unharmed where a layer works in place."""
        is_tuple = isinstance(x, tuple)

        def call(*tensors: Any) -> Any:
            return run(map_tensors(torch.clone, tensors if is_tuple else tensors[0]))

        return self.activation_checkpoint_func(call, *(x if is_tuple else (x,)))

    def _is_checkpointable(self, layers: Sequence[Layer]) -> bool:
        if self.checkpointable_layers is not None:
            return all(layer.kind in self.checkpointable_layers for layer in layers)
        return any(layer.parameters for layer in layers)
