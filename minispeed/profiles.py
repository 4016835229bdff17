"""Say how fast machines are: what a device computes, moves and sends in a second, published or measured.

A planner divides closed forms by these rates: FLOPs by `flops`, bytes by `bandwidth`, and every operation costs
`overhead` however small it is. A message of n bytes takes latency + n / bandwidth seconds (Hockney 1994).

    rates of a machine  =  one entry for each number of ranks that are busy at once: ranks share a CPU's cores

A profile is one of the published machines (`published.py`) or a JSON file that `minispeed calibrate` wrote.

Hockney 1994, The communication challenge for MPP. https://doi.org/10.1016/S0167-8191(06)80021-9
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from minispeed.errors import UserError, nearest

MEASURED = Path("~/.cache/minispeed/profile.json")  # where `minispeed calibrate` writes and "measured" is read from
TABLES = ("flops", "attention", "between")  # rates by dtype


@dataclass(frozen=True, kw_only=True)
class Link:
    """The way from a rank to another.

    latency    seconds that a message takes however short it is
    bandwidth  bytes that one rank sends in a second
    """

    latency: float
    bandwidth: float

    def seconds(self, size: float, messages: int = 1) -> float:
        """Return the time of `messages` messages one after the other, of `size` bytes together."""
        return messages * self.latency + size / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What each rank does in a second while `ranks` ranks of one machine are busy.

    flops      by dtype ("fp64", "fp32", "bf16", "fp16"): FLOPs of large matrix products
    bandwidth  bytes of memory, read and written, by operations on long arrays: the optimizer's
    overhead   seconds that an operation costs however small it is
    link       to another rank of the same machine
    attention  by dtype: FLOPs of the fused attention, forward and backward; absent: as products
    between    by dtype: bytes read and written by element-wise operations inside a layer, whose arrays are short, and
               often strided; absent: as `bandwidth`
    """

    ranks: int
    flops: Mapping[str, float]
    bandwidth: float
    overhead: float
    link: Link
    attention: Mapping[str, float] = field(default_factory=dict)
    between: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A kind of machine, and how fast its devices are.

    per_machine  devices of one machine
    memory       bytes of one device
    rates        by number of busy ranks, fewest first, at least one entry
    between      to a rank of another machine
    host         between a device and its machine's memory, where what is offloaded lies
    host_memory  bytes of that memory
    peak         by dtype: the FLOPs a second that a datasheet promises, what MFU divides by; empty if unknown
    efficiency   the share of the peak that large products reach; already in `flops`
    source       where the figures are from
    machine      of a measured profile: processor and cores
    on_cpu       whether the devices are shares of the machine's cores: messages then take their time from computing,
                 and cannot hide behind it
    """

    name: str
    source: str
    per_machine: int
    memory: int
    rates: tuple[Rates, ...]
    between: Link
    host: Link
    host_memory: int
    peak: Mapping[str, float] = field(default_factory=dict)
    efficiency: float = 1.0
    machine: str = ""
    on_cpu: bool = False

    def __post_init__(self) -> None:
        if not self.rates:
            raise UserError(f"the profile {self.name!r} has no rates", fix="minispeed calibrate, which measures them")
        _check_positive(self)

    def at(self, ranks: int) -> Rates:
        """Return the rates of the entry with the fewest busy ranks that are at least so many; else of the last."""
        return next((entry for entry in self.rates if entry.ranks >= ranks), self.rates[-1])

    def link(self, ranks: int, *, machines: int = 1) -> Link:
        """Return the slowest link of a group that spans so many machines, on each of which `ranks` ranks are busy."""
        return self.at(ranks).link if machines == 1 else self.between

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Profile":
        """Build from what `to_dict` returned; UserError names a key that is unknown or missing."""
        return _build(cls, values, "a profile")

    def save(self, path: Path) -> None:
        """Write the profile as JSON; whatever happens, the file that stood there is whole until this one is."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.writing")
        with aside.open("w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


def load(name: str | Path) -> Profile:
    """Return the published profile of this name, the one that a JSON file holds, or what was last "measured" here.

    Raises  UserError listing the published ones if there is neither; naming the key that a file has wrong
    """
    from minispeed.published import PUBLISHED

    if str(name) in PUBLISHED:
        return PUBLISHED[str(name)]
    path = (MEASURED if name == "measured" else Path(name)).expanduser()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds no object but {type(values).__name__}")
    except OSError as error:
        what = f"no profile is called {str(name)!r}, and {path} cannot be read: {error.strerror}"
        close = nearest(str(name), PUBLISHED) or next(iter(PUBLISHED))
        fix = f"{close}, or minispeed calibrate, which measures this machine"
        raise UserError(f"{what}; published: {', '.join(PUBLISHED)}", fix=fix) from None
    except ValueError as error:
        what = f"the profile {path} is not JSON: {error}; published: {', '.join(PUBLISHED)}"
        raise UserError(what, fix="minispeed calibrate, which writes one") from None
    return Profile.from_dict(values)


def this_machine() -> str:
    """Return this machine's processor and how many cores of it this process may use."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())}, {cores()} cores"


def cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_machine(profile: Profile) -> str:
    """Return a sentence to print if a profile was measured on another machine than this one, else ""."""
    here = this_machine()
    if not profile.machine or profile.machine.startswith(here):
        return ""
    measured = f"the profile {profile.name!r} was measured on {profile.machine}; this machine is {here}"
    return f"{measured}: times are those of the other one (minispeed calibrate measures this one)"


def _build(cls: Any, values: Any, what: str) -> Any:
    """Build a dataclass of this file from JSON's values."""
    if not isinstance(values, Mapping):
        raise UserError(f"{what} is written as an object, got {values!r}", fix="minispeed calibrate, which writes one")
    names = [one.name for one in fields(cls)]
    for name in values:
        if name not in names:
            raise UserError(f"{what} has no {name!r}", fix=nearest(name, names) or f"one of {', '.join(names)}")
    read = dict(values)
    for name in ("link", "host") + ("between",) * (cls is Profile):
        if name in read:
            read[name] = _build(Link, read[name], f"the link {name!r} of {what}")
    if "rates" in read:
        read["rates"] = tuple(_build(Rates, one, f"the rates of {what}") for one in read["rates"])
    try:
        return cls(**read)
    except TypeError as error:
        missing = str(error).partition(": ")[2] or error
        raise UserError(f"{what} is incomplete: {missing}", fix="minispeed calibrate, which writes one") from None


def _check_positive(profile: Profile) -> None:
    """Raise UserError for a rate that is no number above 0, so that whoever divides by it need not look."""
    of_rates = [
        {"ranks": at.ranks, "bandwidth": at.bandwidth, "link.bandwidth": at.link.bandwidth}
        | {f"{table}.{dtype}": rate for table in TABLES for dtype, rate in getattr(at, table).items()}
        for at in profile.rates
    ]
    whole = {"per_machine": profile.per_machine, "memory": profile.memory, **profile.peak}
    links = {"between.bandwidth": profile.between.bandwidth, "host.bandwidth": profile.host.bandwidth}
    for values in (whole, links, *of_rates):
        for name, value in values.items():
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                what = f"{name} of the profile {profile.name!r} must be a number above 0, got {value!r}"
                raise UserError(what, fix="minispeed calibrate, which measures it")
