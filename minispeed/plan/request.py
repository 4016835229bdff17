"""Say what a plan is asked for: a model, a step's rows, the devices, and which of the choices are made already.

The choices, `KNOBS`, are those of the engine. A request may fix any; what is left is searched.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minispeed.axes import SEQUENCE
from minispeed.errors import UserError, nearest
from minispeed.ledger.job import Job
from minispeed.ledger.states import BYTES
from minispeed.model.config import GPTConfig
from minispeed.model.presets import PRESETS
from minispeed.pipeline.schedule import SCHEDULES
from minispeed.profiles import Profile
from minispeed.sizes import spell_size

OFFLOADS = {"none": (False, False), "optimizer": (True, False), "all": (True, True)}  # optimizer states, parameters
KNOBS: Mapping[str, tuple[Any, ...]] = {  # name -> the values that are tried; (): those that the case allows
    "dp": (),
    "pp": (),
    "sp": (),
    "tp": (),
    "schedule": tuple(SCHEDULES),
    "virtual": (1, 2, 4),
    "sequence": SEQUENCE,
    "tokens": (False, True),
    "zero": (0, 1, 2, 3),
    "offload": tuple(OFFLOADS),
    "recompute": ("none", "attention", "all"),
    "micro_batch": (),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned.

    rows, tokens   of a step, all replicas together; of each row
    memory         bytes of one device that the run may fill
    dtype, supervised, lora_rank, lora_targets   as `minispeed.ledger.job.Job`
    fixed          choices that are made already, by the names of `KNOBS`
    Raises         UserError for numbers below 1, a dtype that the devices have no products in, or an unknown choice
    """

    model: GPTConfig
    devices: int
    rows: int
    tokens: int
    memory: int
    profile: Profile
    dtype: str = "bf16"
    supervised: float = 1.0
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("devices", "rows", "tokens", "memory"):
            if getattr(self, name) < 1:
                raise UserError(f"a plan for {getattr(self, name)} {name}", fix="1 or more")
        if self.dtype not in BYTES:
            raise UserError(f"no dtype is called {self.dtype!r}", fix=nearest(self.dtype, BYTES) or "bf16")
        known = self.profile.at(self.devices).flops
        if self.dtype not in known:
            what = f"the profile {self.profile.name!r} has no products in {self.dtype}"
            raise UserError(what, fix=f"one of {', '.join(known)}")
        if self.tokens > self.model.max_positions:
            what = f"rows of {self.tokens} tokens, and the model reads {self.model.max_positions}"
            raise UserError(what, fix=f"--seq {self.model.max_positions}")
        for name, value in self.fixed.items():
            self._check_fixed(name, value)

    def _check_fixed(self, name: str, value: Any) -> None:
        if name not in KNOBS:
            raise UserError(f"a plan has no choice {name!r}", fix=nearest(name, KNOBS) or f"one of {', '.join(KNOBS)}")
        if name == "recompute" and str(value).isdecimal():
            return
        if KNOBS[name] and value not in KNOBS[name] and name != "virtual":
            raise UserError(f"{name} is fixed at {value!r}", fix=f"one of {', '.join(map(str, KNOBS[name]))}")

    def values(self, name: str) -> tuple[Any, ...]:
        """Return the values of a choice that are tried."""
        return (self.fixed[name],) if name in self.fixed else KNOBS[name]

    def allows(self, name: str, value: Any) -> bool:
        """Whether a choice may have a value."""
        return name not in self.fixed or self.fixed[name] == value

    @property
    def words(self) -> str:
        """What is asked for, in a line."""
        named = next((name for name, config in PRESETS.items() if config == self.model), "a model")
        adapters = f", LoRA of rank {self.lora_rank}" if self.lora_rank else ""
        return (
            f"{named} in {self.dtype}{adapters}, {self.rows} rows of {self.tokens} tokens a step, on {self.devices} "
            f"device{'s' * (self.devices > 1)} of {spell_size(self.memory)} ({self.profile.name})"
        )


def choices(job: Job) -> dict[str, Any]:
    """Return what a job has chosen, by the names of `KNOBS`."""
    sides = {axis: job.mesh.sizes[axis] for axis in ("dp", "pp", "sp", "tp")}
    offload = {pair: name for name, pair in OFFLOADS.items()}[job.offload_optimizer, job.offload_param]
    of_layout = {name: getattr(job.layout, name) for name in ("schedule", "virtual", "sequence", "tokens")}
    settings = {"zero": job.zero, "offload": offload, "recompute": job.recompute, "micro_batch": job.micro_batch}
    return sides | of_layout | settings


def line_of(job: Job) -> str:
    """Return what a job has chosen, in a line; what goes without saying is left out."""
    said = choices(job)
    parts = [f"{axis} {said[axis]}" for axis in ("dp", "pp", "sp", "tp") if said[axis] > 1] or ["one device"]
    if said["pp"] > 1:
        parts.append(str(said["schedule"]) + (f" of {said['virtual']} stages a rank" if said["virtual"] > 1 else ""))
    parts += [str(said["sequence"])] if said["sp"] > 1 else []
    parts += ["tokens cut"] if said["tokens"] else []
    parts += [f"ZeRO {said['zero']}"] if said["zero"] else []
    parts += [f"micro-batches of {said['micro_batch']}"]
    parts += [f"recompute {said['recompute']}"] if said["recompute"] != "none" else []
    parts += [f"offload {said['offload']}"] if said["offload"] != "none" else []
    return ", ".join(parts)


def spell_seconds(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
