"""Laws of launch: one function, any carrier; the debugger's page is what happens; two machines meet."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minispeed
from minispeed.collective.launch import under_torchrun
from minispeed.errors import UserError

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def total(world, *terms):
    x = torch.tensor([float(world.rank), *terms])
    world.group.all_reduce(x).wait()
    return x.tolist()


def test_the_same_function_runs_on_threads_and_on_processes():
    assert minispeed.launch(total, 5.0, ranks=2) == [[1.0, 10.0]] * 2
    assert minispeed.launch(total, 5.0, ranks=2, backend="gloo") == [[1.0, 10.0]] * 2
    assert minispeed.launch(total) == [[0.0]]


AGENTS = """
import minispeed
import torch

def step(world):
    x = torch.tensor([2.0**world.rank])
    world.group.all_reduce(x).wait()
    across = world.subgroup([[0, 2], [1, 3]])
    y = torch.tensor([world.rank])
    across.all_reduce(y).wait()
    return world.rank, x.item(), y.item(), across.members

print(minispeed.launch(step, ranks=3), minispeed.launch(lambda world: world.size), flush=True)
"""


def test_two_machines_meet_through_torchrun(tmp_path):
    """Two of torchrun's agents on this machine play two nodes of two ranks each."""
    script = tmp_path / "script.py"
    script.write_text(AGENTS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", f"--node-rank={node}", *common, str(script)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    try:
        said = [agent.communicate(timeout=90) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    lines = sorted(line for out, _ in said for line in out.splitlines() if line)
    assert lines == [f"[({r}, 15.0, {2 * (r % 2) + 2}, {(r % 2, r % 2 + 2)})] [4]" for r in range(4)]
    assert "launch asks for 3 ranks, torchrun started 4: running on 4" in said[0][1]


@pytest.mark.parametrize("name", ["cluster.py", "zero.py"])
def test_the_debuggers_page_is_what_happens(tmp_path, name):
    page = (ROOT / "docs" / "debugger.md").read_text()
    section = next(part for part in page.split("## ") if f"$ python {name}" in part)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (session,) = re.findall(r"```console\n.*?\n(.*?)```", section, re.DOTALL)
    typed = re.findall(r"^\(Pdb\) (.*)$", session, re.MULTILINE)
    expected = _without_line_numbers(re.sub(r"\(Pdb\) .*\n", "(Pdb) ", session))  # what is typed is not echoed
    (tmp_path / name).write_text(code)
    later = sys.version_info >= (3, 13)
    got = _debug(tmp_path / name, ["n"] * later + typed)
    assert got.endswith(expected) if later else got == expected, got
    undisturbed = _debug(tmp_path / name, ["c"])
    assert undisturbed.splitlines()[-3:] == got.splitlines()[-3:]  # whoever looked changed nothing


def _debug(script, typed):
    run = subprocess.run(
        [sys.executable, str(script)],
        input="\n".join(typed) + "\n",
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    shown = run.stdout.replace(f"{script.parent}{os.sep}", "").replace(f"{ROOT}{os.sep}", "")
    return _without_line_numbers(shown.replace(os.sep, "/"))


def _without_line_numbers(text):
    """The library's lines move; those of the page's own scripts are fixed."""
    return re.sub(r"(minispeed/\S*\.py)[:(]\d+\)?", r"\1", text)


PROMPT = """
import minispeed
def f(world): return world.rank
print(minispeed.launch(f, ranks=3))
try:
    minispeed.launch(f, ranks=2, backend="gloo")
except ValueError as error:
    print(error)
"""


def test_functions_of_the_prompt_run_on_threads_and_are_named_for_processes():
    run = subprocess.run(
        [sys.executable, "-"], input=PROMPT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert "[0, 1, 2]" in run.stdout, run.stderr
    assert "was defined at the prompt, and another process cannot import it; try: backend=" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "thread"}, r"there is no backend 'thread'; try: threads"),
        ({"ranks": 0}, r"launch with 0 ranks; try: ranks=1"),
        ({"backend": "gloo", "lockstep": True}, r"lockstep needs ranks that are threads, got 'gloo'"),
        ({"backend": "gloo"}, r"<lambda>.* cannot go to another process: .*try: backend=\"threads\""),
        ({"backend": "nccl", "ranks": 1000}, r"1000 ranks on nccl need as many GPUs, this machine has \d"),
    ],
)
def test_mistakes_name_the_way_out(arguments, message):
    with pytest.raises(UserError, match=message):
        minispeed.launch(lambda world: None, **arguments)


def test_torchrun_is_known_by_its_environment(monkeypatch):
    assert not under_torchrun()
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert under_torchrun()
    with pytest.raises(UserError, match="lockstep needs ranks that are threads, got torchrun's processes"):
        minispeed.launch(lambda world: None, lockstep=True)


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'lunch'"):
        minispeed.lunch  # noqa: B018


@pytest.mark.gpu
def test_one_gpu_speaks_nccl():
    assert minispeed.launch(total, 5.0, ranks=1, backend="nccl") == [[0.0, 5.0]]
