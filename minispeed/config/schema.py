"""The honoured keys, each declared once: as a field of a `Config`, with its type, its default and what it does here.

A section's fields are keys under its prefix; a field's key has the field's name where it says no other. The defaults
are those of DeepSpeed 0.19.8's code; its page (https://www.deepspeed.ai/docs/config-json/) has other ones of
steps_per_print (10) and stage3_prefetch_bucket_size (5e8).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minispeed.config.check import (
    AMOUNT,
    BLOCK,
    BOOLEAN,
    COUNT,
    DTYPE,
    ONE_OR_MORE,
    POSITIVE,
    TEXT,
    choice,
    maybe,
    whole,
)
from minispeed.config.key import honoured, section

OTHER_TWO = "from the two others"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of a step: train = micro x accumulation x data-parallel ranks."""

    train: int = honoured(
        ONE_OR_MORE, None, "samples of a step, all ranks together", key="train_batch_size", derived=OTHER_TWO
    )
    micro: int = honoured(
        ONE_OR_MORE,
        None,
        "samples that go through a rank's model at once",
        key="train_micro_batch_size_per_gpu",
        derived=OTHER_TWO,
    )
    accumulation: int = honoured(
        ONE_OR_MORE, None, "micro-batches of a step", key="gradient_accumulation_steps", derived=f"{OTHER_TWO}, or 1"
    )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer by name ("AdamW", "Adam", "SGD", or a class of torch.optim) and all its settings."""

    type: str = honoured(
        TEXT._replace(example="AdamW"), None, "which optimizer is made where the caller brings none; see below"
    )
    params: Mapping[str, Any] = honoured(BLOCK, {}, "its settings; see below")


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """A schedule of `minispeed.schedules` by name, and its settings."""

    type: str = honoured(
        TEXT._replace(example="WarmupLR"),
        None,
        "which learning-rate schedule is made where the caller brings none; see below",
    )
    params: Mapping[str, Any] = honoured(BLOCK, {}, "its settings; see below")


@dataclass(frozen=True, kw_only=True)
class Fp16:
    """Half precision and its loss scale."""

    enabled: bool = honoured(BOOLEAN, False, "parameters and products in fp16, masters in fp32")
    auto_cast: bool = honoured(BOOLEAN, False, "the model's inputs are cast to fp16 where they have a fraction")
    loss_scale: float = honoured(AMOUNT, 0.0, "what the loss is multiplied by; 0: found while training")
    initial_scale_power: int = honoured(whole(0, 127), 16, "a scale that is found starts at 2 to this power")
    loss_scale_window: int = honoured(ONE_OR_MORE, 1000, "steps without overflow after which the scale doubles")
    hysteresis: int = honoured(ONE_OR_MORE, 2, "overflows that it takes to halve the scale")
    consecutive_hysteresis: bool = honoured(BOOLEAN, False, "a step without overflow restores the hysteresis")
    min_loss_scale: float = honoured(POSITIVE, 1.0, "the scale never goes below")

    @property
    def is_dynamic(self) -> bool:
        """Whether the loss scale is found while training."""
        return self.loss_scale == 0

    @property
    def first_scale(self) -> float:
        """What the loss is multiplied by in the first step."""
        return 2.0**self.initial_scale_power if self.is_dynamic else self.loss_scale


@dataclass(frozen=True, kw_only=True)
class Bf16:
    """bfloat16."""

    enabled: bool = honoured(BOOLEAN, False, "parameters and products in bf16, masters in fp32")


@dataclass(frozen=True, kw_only=True)
class Offload:
    """Where what is rarely needed lives."""

    device: str = honoured(
        choice("none", "cpu", "nvme"), "none", "none: the rank's own; cpu: it lies and steps there; nvme is refused"
    )


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What the ranks cut among them, and how messages and compute overlap. Sizes are in elements."""

    stage: int = honoured(whole(0, 3), 0, "what is cut: 1 optimizer states, 2 gradients too, 3 parameters too")
    reduce_bucket_size: int = honoured(
        ONE_OR_MORE, 500_000_000, "stages 1 and 2: parameters up to so many elements are reduced together"
    )
    overlap_comm: bool = honoured(
        maybe(BOOLEAN), None, "compute goes on while gradients are summed", derived="true at stage 3, else false"
    )
    prefetch_bucket_size: int = honoured(
        COUNT,
        50_000_000,
        "stage 3: so many elements of the next units are gathered while one computes",
        key="stage3_prefetch_bucket_size",
    )
    param_persistence_threshold: int = honoured(
        COUNT,
        100_000,
        "stage 3: a unit (a layer) of fewer elements stays whole",
        key="stage3_param_persistence_threshold",
    )
    gather_16bit_weights_on_model_save: bool = honoured(
        BOOLEAN,
        False,
        "stage 3: `save_16bit_model` may gather and write the weights",
        key="stage3_gather_16bit_weights_on_model_save",
    )
    offload_optimizer: Offload = section("offload_optimizer")
    offload_param: Offload = section("offload_param")


@dataclass(frozen=True, kw_only=True)
class TensorParallel:
    """How many ranks share each layer's width. DeepSpeed takes `tp_size` only beside an equal `autotp_size`."""

    autotp_size: int = honoured(
        COUNT, 0, "ranks that share each layer's width, and its rows; 0 or 1: every rank is whole"
    )
    tp_size: int = honoured(ONE_OR_MORE, 1, "the same, where `autotp_size` is not given", key="tp.tp_size")

    @property
    def ranks(self) -> int:
        """How many ranks together hold one copy of the model."""
        return max(self.autotp_size, self.tp_size)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How the stages of a PipelineModule run; the rest is said to PipelineModule itself."""

    schedule: str = honoured(
        choice("1f1b", "gpipe", "zb_h1"), "1f1b", "a key of our own: in which order a rank runs forwards and backwards"
    )
    activation_checkpoint_interval: int = honoured(
        COUNT, 0, "so many layers are recomputed together; 0: as PipelineModule was told"
    )


@dataclass(frozen=True, kw_only=True)
class DataTypes:
    """Dtypes beside the one that is computed in."""

    grad_accum_dtype: str = honoured(
        maybe(DTYPE),
        None,
        "gradients are added up over micro-batches in it",
        derived="the compute dtype, fp32 where gradients are accumulated",
    )


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Where loss, rate and loss scale are written."""

    enabled: bool = honoured(BOOLEAN, False, "loss, learning rate and loss scale are written at each step, by rank 0")
    output_path: str = honoured(TEXT, "", "directory that is written to; empty: the working directory")
    job_name: str = honoured(TEXT, "DeepSpeedJobName", "directory inside output_path")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is checked when a checkpoint is saved."""

    tag_validation: str = honoured(
        choice("Ignore", "Warn", "Fail"), "Warn", "what follows when ranks save under different tags"
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A configuration in which every value is known.

    notes    lines for rank 0 to print once: what was given and has no effect, or another one than it seems
    origins  by honoured key: "config", "default", "alias of NAME" or "derived from ..."
    raw      the dict as it was given
    """

    batch: Batch = section("")
    optimizer: Optimizer | None = section("optimizer")
    scheduler: Scheduler | None = section("scheduler")
    fp16: Fp16 = section("fp16")
    bf16: Bf16 = section("bf16")
    zero: Zero = section("zero_optimization")
    tensor_parallel: TensorParallel = section("tensor_parallel")
    pipeline: Pipeline = section("pipeline")
    data_types: DataTypes = section("data_types")
    tensorboard: Monitor = section("tensorboard")
    csv_monitor: Monitor = section("csv_monitor")
    checkpoint: Checkpoint = section("checkpoint")
    gradient_clipping: float = honoured(AMOUNT, 1.0, "largest norm of the gradient; 0.0 leaves it alone")
    prescale_gradients: bool = honoured(
        BOOLEAN, False, "gradients are divided by the number of ranks before they are summed, not after"
    )
    gradient_predivide_factor: float = honoured(
        POSITIVE, 1.0, "gradients are divided by this before they are summed, and by the rest of the ranks after"
    )
    communication_data_type: str = honoured(maybe(DTYPE), None, "gradients travel in it", derived="the compute dtype")
    compression: str = honoured(
        choice("none", "onebit"),
        "none",
        "a key of our own. onebit: gradients travel as signs, and what that leaves out is added to the next ones; "
        "stages 0 and 1, not with fp16",
    )
    compression_freeze_step: int = honoured(
        COUNT,
        0,
        "a key of our own. onebit: so many updates are made before, and after a checkpoint is loaded, in "
        "communication_data_type; an AdamW that is named here then keeps its second moment; 0: from the first on, and "
        "it does not",
    )
    steps_per_print: int | None = honoured(maybe(ONE_OR_MORE), None, "steps between lines of progress; null: none")
    wall_clock_breakdown: bool = honoured(BOOLEAN, False, "seconds of forward, backward and step are printed")
    memory_breakdown: bool = honoured(BOOLEAN, False, "memory in use is printed around forward, backward and step")
    dump_state: bool = honoured(BOOLEAN, False, "the configuration is printed once")
    dataloader_drop_last: bool = honoured(BOOLEAN, False, "the last batch of an epoch is left out if it is short")
    zero_allow_untested_optimizer: bool = honoured(
        BOOLEAN, False, "from stage 1 on, torch's optimizers are allowed that no test here compares with stage 0"
    )
    notes: tuple[str, ...]
    origins: Mapping[str, str]
    raw: Mapping[str, Any]

    @property
    def dtype(self) -> str:
        """The dtype of parameters and products, by its short name."""
        return "fp16" if self.fp16.enabled else "bf16" if self.bf16.enabled else "fp32"
