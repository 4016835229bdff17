"""Laws of the examples: losses fall, two ranks print what one prints, and a run that was resumed what one that was not.

Where DeepSpeed is installed the same scripts run with it, one line changed, and print the same.
"""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
LINE = "import minispeed as deepspeed  # the only line to change"
FALLS = {  # what falls in each script, and to which part of its first value at most
    "image_classifier": ("loss", 0.1),
    "gan": ("distance", 0.4),
    "bert": ("loss", 0.8),
    "pipeline": ("loss", 0.1),
    "gpt2_sft": ("loss", 0.6),
}
FLAGS = {  # on one rank and on two
    "bert": (["--steps", "30"], ["--steps", "30"]),
    "gpt2_sft": (["--stage", "2"], ["--stage", "3"]),
}
CLOSE = dict(rel=1e-4, abs=1e-4)  # runs in fp32 that add up in another order; measured: 5e-6
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
}
DRIVER = """
import json, os, runpy, sys
for name, *sys.argv in json.loads(sys.argv[1]):
    if os.environ["RANK"] == "0":
        print("run", name, flush=True)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""

Lines = list[dict[str, float]]  # of each line that a script printed, the numbers by their names


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")


pytestmark = pytest.mark.timeout(300)
libraries = pytest.mark.parametrize("library", ["minispeed", pytest.param("deepspeed", marks=needs("deepspeed"))])
scripts = pytest.mark.parametrize(
    "script", [pytest.param(name, marks=needs("transformers") if name == "gpt2_sft" else ()) for name in FALLS]
)


class Scripts:
    """The scripts with one of the libraries, and what they print."""

    def __init__(self, library: str, folder: Path) -> None:
        self.library, self.folder, self.checkpoints = library, folder / "examples", folder / "checkpoints"
        shutil.copytree(EXAMPLES, self.folder)
        self.names = [name for name in FALLS if name != "gpt2_sft" or find_spec("transformers")]
        for name in FALLS:
            text = (EXAMPLES / f"{name}.py").read_text()
            (self.folder / f"{name}.py").write_text(text.replace(LINE, f"import {library} as deepspeed"))

    @cached_property
    def one(self) -> dict[str, Lines]:
        """What each prints on one rank."""
        return {name: self.alone(name, *FLAGS.get(name, [[]])[0]) for name in self.names}

    @cached_property
    def two(self) -> dict[str, Lines]:
        """What each prints on two, and "resumed": a bert that goes on from the other's checkpoint after 20 steps."""
        flags = {name: [name, *FLAGS.get(name, [[], []])[1]] for name in self.names}
        flags["bert"] += ["--checkpoints", str(self.checkpoints)]
        flags["resumed"] = [*flags["bert"], "--resume"]
        flags["pipeline"] = flags.pop("pipeline")  # last: DeepSpeed makes no other engine after it in one process
        (self.folder / "driver.py").write_text(DRIVER)
        runs = [[name, str(self.folder / f"{script}.py"), *more] for name, (script, *more) in flags.items()]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
        out = run([*torchrun, str(self.folder / "driver.py"), json.dumps(runs)])
        parts = re.split(r"^run (\w+)\n", out, flags=re.MULTILINE)
        return dict(zip(parts[1::2], map(numbers, parts[2::2])))

    def alone(self, name: str, *flags: str) -> Lines:
        """Run a script as `python SCRIPT`; DeepSpeed must be told that there is one rank, or it looks for MPI."""
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        told = {} if self.library == "minispeed" else {**place, "MASTER_PORT": str(free_port())}
        return numbers(run([str(self.folder / f"{name}.py"), *flags], **told))


def run(words: list[str], **more: str) -> str:
    """Run Python; return what it prints."""
    ended = subprocess.run(
        [sys.executable, *words], env={**ENVIRONMENT, **more}, capture_output=True, text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def numbers(out: str) -> Lines:
    """Return the numbers in a script's lines: "step 3: loss 0.5, rate 0.1" -> {"loss": 0.5, "rate": 0.1}."""
    lines = [line for line in out.splitlines() if re.match(r"(step|epoch) \d+:", line)]
    return [{name: float(x) for name, x in re.findall(r"([a-z]+) (\d+\.\d+)", line)} for line in lines]


def are_close(ours: Lines, theirs: Lines) -> bool:
    return len(ours) == len(theirs) > 2 and all(
        one == pytest.approx(other, **CLOSE) for one, other in zip(ours, theirs)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the scripts with a library; what they print is asked for once."""
    return functools.cache(lambda library: Scripts(library, tmp_path_factory.mktemp(library)))


@scripts
def test_one_line_makes_it_a_script_for_deepspeed(script):
    text = (EXAMPLES / f"{script}.py").read_text()
    assert text.count("minispeed") == 1
    assert next(line for line in text.splitlines() if line.startswith(("import ", "from "))) == LINE


@libraries
@scripts
def test_it_learns(made, library, script):
    name, part = FALLS[script]
    values = [line[name] for line in made(library).one[script]]
    assert len(values) > 2 and values[-1] < part * values[0]


@libraries
@scripts
def test_two_ranks_print_what_one_prints(made, library, script):
    """The batch is that of all ranks; gpt2_sft is at ZeRO stage 2 on one, and at 3 on two."""
    assert are_close(made(library).two[script], made(library).one[script])


@libraries
def test_a_resumed_run_prints_what_the_straight_one_does(made, library):
    two = made(library).two
    assert len(two["resumed"]) == 10 and two["resumed"] == two["bert"][20:]


def test_a_checkpoint_of_two_ranks_goes_on_on_one(made):
    ours = made("minispeed")
    assert are_close(ours.two["bert"], ours.one["bert"])
    resumed = ours.alone("bert", *FLAGS["bert"][0], "--checkpoints", str(ours.checkpoints), "--resume")
    assert are_close(resumed, ours.one["bert"][20:])


@needs("deepspeed")
@scripts
def test_deepspeed_prints_the_same(made, script):
    assert are_close(made("minispeed").one[script], made("deepspeed").one[script])
