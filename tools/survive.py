"""Kill a run, again and again, and see that nothing of it is lost: `make survive N=50`.

    torchrun starts a small run -> kill -9 of one rank, or of all -> it goes on -> kill -9 -> ... -> the end

One rank that is killed is torchrun's to start again; where all are killed, and torchrun with them, the command is given
once more with --resume, in every third run on another layout. The moments are drawn: after some step, or as soon as a
checkpoint is being written. What comes out must be what the undisturbed run gives: the parameters bit for bit, or,
where the layout changed, to 1e-10 in float64; each step once, with the same loss of as many tokens.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY, AHEAD = 40, 3, 8  # steps of a run, between checkpoints, and from a start to the next kill at most
KILLS_OF_A_RUN = 6
PATIENCE = 180.0  # seconds until something happens
LAYOUTS = {  # ranks, and what is said of how they share the work
    "alone": (1, []),
    "dp 2": (2, []),
    "zero 1": (2, ["--zero", "1"]),
    "zero 3": (2, ["--zero", "3"]),
    "tp 2": (2, ["--tp", "2"]),
    "pp 2": (2, ["--pp", "2"]),
}


class Lost(Exception):
    """Something that a run should have kept."""


@dataclass(frozen=True)
class Kill:
    """When, and whom: after a step or, `saving`, at the first checkpoint that is written after it; one rank or all."""

    step: int
    saving: bool
    everyone: bool

    def __str__(self) -> str:
        whom, doing = "all" if self.everyone else "one", "saving" if self.saving else "training"
        return f"{whom} killed {doing} after step {self.step}"


@dataclass
class Run:
    """A run in a folder, and torchrun's process while there is one."""

    data: Path
    out: Path
    dtype: str
    layout: str
    steps: int = STEPS
    more: list[str] = field(default_factory=list)
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Start it, or go on with it."""
        ranks, words = LAYOUTS[self.layout]
        said = f"sft --model nano --data {self.data} --out {self.out} --cache {self.data.parent / 'cache'} --seq 64"
        said += f" --batch 4 --micro-batch 1 --vocab-size 300 --warmup 2 --lr 1e-3 --threads 1 --steps {self.steps}"
        said += f" --dtype {self.dtype} --save-every {SAVE_EVERY} --eval-every 10 --score 0 --max-new 8"
        if (self.out / "checkpoints" / "last").exists():
            said += " --resume"
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} --max-restarts 100 -m minispeed"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *torchrun.split(), *said.split(), *words, *self.more]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True
            )

    @property
    def log(self) -> Path:
        """Where its output goes, of all starts."""
        return self.out.with_name(self.out.name + ".log")

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks that run now, in the order in which they were started."""
        assert self.process is not None
        return sorted(pid for pid in children_of(self.process.pid) if b"minispeed" in command_of(pid))

    def updates(self) -> list[dict[str, float]]:
        """Return the lines of its steps; without those cut short."""
        return [line for line in lines_of(self.out / "metrics.jsonl") if "norm" in line]

    def wait(self) -> None:
        """Return once it has ended well."""
        assert self.process is not None
        if self.process.wait(PATIENCE):
            raise Lost(f"the run ended with code {self.process.returncode}; its words are in {self.log}")

    def end(self) -> None:
        """End torchrun and all ranks at once, and return when they are gone."""
        if self.process is not None:
            pids = [self.process.pid, *self.ranks()]
            for pid in pids:
                kill(pid)
            self.process.wait(PATIENCE)
            until(lambda: not any(is_alive(pid) for pid in pids), "killed processes to be gone")


def hit(run: Run, blow: Kill, chance: random.Random) -> bool:
    """Wait for the moment and kill; return whether it came before the run had ended.

    Where all are killed they are not started again.
    """
    checkpoints = run.out / "checkpoints"

    def is_time() -> bool:
        if not run.is_running:
            return True
        if blow.saving:
            return run_step(run) >= blow.step and any(checkpoints.glob(".step-*.writing"))
        return run_step(run) >= blow.step

    until(is_time, str(blow))
    time.sleep(chance.uniform(0, 0.005 if blow.saving else 0.1))
    if not run.is_running:
        return False
    if blow.everyone:
        run.end()
    elif ranks := run.ranks():
        kill(chance.choice(ranks))
        until(lambda: not run.is_running or bool(set(run.ranks()) - set(ranks)), "torchrun to start the ranks again")
    return True


def survive(run: Run, kills: int, chance: random.Random, *, moves: bool, told: Callable[[str], None]) -> int:
    """Let a run come to its end through up to so many kills; return how many there were.

    moves  every start after a kill is on another layout
    """
    run.start()
    count, first = 0, 1
    while count < kills and first < run.steps - 1:
        blow = Kill(
            step=chance.randint(first, min(first + AHEAD, run.steps - 2)),
            saving=chance.random() < 0.5,
            everyone=moves or chance.random() < 0.5,
        )
        if not hit(run, blow, chance):
            break
        count += 1
        told(f"{run.dtype}, {run.layout}: {blow}")
        if blow.everyone:
            run.layout = chance.choice([name for name in LAYOUTS if name != run.layout]) if moves else run.layout
            run.start()
        first = run_step(run) + 1  # lines of steps that are made again are there already
    run.wait()
    return count


def compare(run: Run, other: Run, *, exact: bool) -> None:
    """Raise Lost unless two runs have made the same steps, each once, and come to the same parameters.

    exact  bit for bit; else to 1e-10 of the largest, in each tensor
    """
    mine, others = run.updates(), other.updates()
    steps = [line["step"] for line in mine]
    if steps != list(range(1, run.steps + 1)):
        raise Lost(f"{run.out / 'metrics.jsonl'} has the steps {steps}")
    for one, two in zip(mine, others, strict=True):
        counts = [one[name] == two[name] for name in ("num_supervised", "num_tokens")]
        if not all(counts) or abs(one["loss"] - two["loss"]) > (0 if exact else 1e-10) * max(1, two["loss"]):
            raise Lost(f"step {one['step']} is {one} in {run.out}, {two} in {other.out}")
    difference = distance(load_file(run.out / "model.safetensors"), load_file(other.out / "model.safetensors"))
    if difference > (0 if exact else 1e-10):
        raise Lost(f"the models in {run.out} and {other.out} differ by {difference:.1e}")


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest difference of two models' parameters, each tensor's divided by its largest above 1."""
    if one.keys() != other.keys():
        raise Lost(f"the models hold {sorted(one.keys() ^ other.keys())} not both")
    pairs = [(one[name], other[name]) for name in one]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)


def write_chats(path: Path) -> Path:
    """Write 60 short conversations: enough for five rows of each of some epochs."""
    words = "red green blue seven eight nine cat dog bird tree".split()
    with path.open("w", encoding="utf-8") as file:
        for number, (first, last) in enumerate(itertools.product(words[:6], words)):
            asked = {"role": "user", "content": f"{first} {number} say {last}"}
            answered = {"role": "assistant", "content": f"{last}!"}
            file.write(json.dumps({"messages": [asked, answered]}) + "\n")
    return path


# ---- what the machine knows


def run_step(run: Run) -> int:
    """Return the last step that has been written down; 0 before the first."""
    return int(max((line["step"] for line in run.updates()), default=0))


def lines_of(path: Path) -> Iterator[dict[str, float]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def until(is_so: Callable[[], bool], what: str) -> None:
    """Return as soon as something is so."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        if time.monotonic() > deadline:
            raise Lost(f"waited {PATIENCE:.0f} s for this: {what}")
        time.sleep(0.001)


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            behind = stat.read_text().rpartition(")")[2].split()  # state, parent, ...
        except OSError:
            continue
        if int(behind[1]) == pid and behind[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def main() -> int:
    """Kill as often as asked, in as many runs as that takes. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, nargs="?", default=50, help="how many (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    chance, calm, count, start = random.Random(asked.seed), dict[tuple[str, str], Run](), 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="survive-") as folder:
        data = write_chats(Path(folder) / "chats.jsonl")

        def undisturbed(dtype: str, layout: str) -> Run:
            if (dtype, layout) not in calm:
                calm[dtype, layout] = run = Run(
                    data, Path(folder) / f"{dtype}-{layout.replace(' ', '-')}", dtype, layout
                )
                run.start()
                run.wait()
            return calm[dtype, layout]

        def told(sentence: str) -> None:
            nonlocal count
            count += 1
            print(f"{count:4}  {sentence}", flush=True)

        for number in itertools.count():
            if count >= asked.kills:
                break
            moves, dtype = number % 3 == 2, "fp32" if number % 3 == 1 else "fp64"
            layout = chance.choice(list(LAYOUTS))
            other = undisturbed(dtype, "alone" if moves else layout)
            run = Run(data, Path(folder) / f"run-{number}", dtype, layout)
            try:
                survive(run, min(KILLS_OF_A_RUN, asked.kills - count), chance, moves=moves, told=told)
                compare(run, other, exact=not moves)
            except Lost as error:
                print(f"{error}\n{run.log.read_text()[-4000:]}", file=sys.stderr)
                return 1
            finally:
                run.end()
            equal = "to 1e-10, over all layouts" if moves else "bit for bit"
            print(f"      {STEPS} steps, each once; the undisturbed run's parameters {equal}", flush=True)
    print(f"{count} kills in {number} runs and {time.monotonic() - start:.0f} s: nothing was lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
