"""Laws of the frame: the command line ends in sentences, set-up is done once, imports go down the floors."""

import errno
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from packaging.requirements import Requirement

import minispeed
from minispeed import __main__ as line
from minispeed.__main__ import COMMANDS, Command, main
from minispeed.errors import UserError
from minispeed.options import Options, option

ROOT = Path(__file__).parent.parent
LIGHT = (  # may be imported without torch
    "minispeed minispeed.__main__ minispeed.options minispeed.errors minispeed.chat.commands "
    "minispeed.chat.conversation minispeed.chat.skills minispeed.chat.read minispeed.chat.template "
    "minispeed.chat.tokenizer minispeed.chat.pack minispeed.chat.prepare"
).split()


def load_bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bootstrap = load_bootstrap()


def python(*words, **more):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, **more)


# ------------------------------------------------------------------------------------------ the command line


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Options):
    """Stand in for a command."""

    code: int = option(0, help="what to end with")


ENDS = {  # what a command raises: the exit code, and what the last words hold
    UserError("no such run: x", fix="minispeed chat runs/demo"): (
        2,
        "minispeed: no such run: x\n  try: minispeed chat runs/demo\n",
    ),
    OSError(errno.ENOSPC, "No space left on device", "runs/x"): (
        2,
        "No space left on device: runs/x\n  try: free",
    ),
    PermissionError(errno.EACCES, "Permission denied", "runs/x"): (
        2,
        "Permission denied: runs/x\n  try: another",
    ),
    ModuleNotFoundError("No module named 'sacrebleu'", name="sacrebleu"): (
        2,
        "try: python -m pip install sacrebleu",
    ),
    ModuleNotFoundError("No module named 'minispeed.x'", name="minispeed.x"): (
        1,
        "this is a bug in minispeed",
    ),
    ZeroDivisionError("division\nby zero"): (
        1,
        "this is a bug in minispeed: ZeroDivisionError division by zero\n",
    ),
    KeyboardInterrupt(): (130, "minispeed: stopped."),
}


@pytest.fixture
def stand_in(monkeypatch):
    """Let `minispeed chat` be a function that ends as told."""
    ending = {}

    def chat(options):
        if "raises" in ending:
            raise ending["raises"]
        return options.code

    monkeypatch.setattr(line, "found", {"here:Options": ChatOptions, "here:chat": chat}.__getitem__)
    monkeypatch.setitem(COMMANDS, "chat", Command("talk", "here:Options", "here:chat"))
    return ending


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_every_error_ends_in_sentences(stand_in, capsys, error):
    stand_in["raises"] = error
    code, words = ENDS[error]
    assert main(["chat"]) == code
    said = capsys.readouterr()
    assert words in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_debug_shows_the_traceback_too(stand_in, capsys):
    stand_in["raises"] = ZeroDivisionError("division by zero")
    assert main(["chat", "--debug"]) == 1
    said = capsys.readouterr().err
    assert 'raise ending["raises"]' in said
    assert said.count("this is a bug in minispeed") == 1


def test_a_command_gives_the_exit_code(stand_in):
    assert main(["chat"]) == 0
    assert main(["chat", "--code", "3"]) == 3
    stand_in["raises"] = SystemExit(4)
    with pytest.raises(SystemExit) as caught:
        main(["chat"])
    assert caught.value.code == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sfft"], "minispeed: there is no command 'sfft'\n  try: minispeed sft\n"),
        (["qqqqqq"], "minispeed: there is no command 'qqqqqq'\n  try: minispeed --help\n"),
        (
            ["--config", "x", "sft"],
            "minispeed: --config comes before the command\n  try: minispeed COMMAND --config\n",
        ),
    ],
)
def test_an_unknown_command_is_answered_with_the_nearest(capsys, words, said):
    assert main(words) == 2
    assert capsys.readouterr().err == said


def test_help_lists_every_command_and_the_version_is_one(capsys):
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name:10} {command.line}\n" in shown for name, command in COMMANDS.items())
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"minispeed {minispeed.__version__}\n"
    assert f'version = "{minispeed.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


def test_help_needs_nothing_but_the_standard_library():
    program = "import sys; from minispeed.__main__ import main; main({}); print('LOADED', *sys.modules)"
    for words in ([], ["--options"], ["sfft"]):
        loaded = python("-c", program.format(words)).stdout.split("LOADED")[1].split()
        assert "minispeed.__main__" in loaded
        assert not {"torch", "numpy", "tokenizers", "matplotlib"} & set(loaded)


@pytest.mark.parametrize("module", LIGHT)
def test_what_must_be_light_does_not_import_torch(module):
    done = python("-c", f"import sys, {module}; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_a_reader_who_goes_away_is_no_error():
    writer = subprocess.Popen(
        [sys.executable, "-m", "minispeed", "--options"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait() == 141
    writer.stderr.close()


# ------------------------------------------------------------------------------------------ set-up


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout in which set-up only notes what it would run; the environment's Python then exists."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    ran = []

    def call(command, **more):
        ran.append([str(word) for word in command])
        if "venv" in command:
            there = bootstrap.venv_python(Path(command[-1]))
            there.parent.mkdir(parents=True)
            there.touch()
        return failing(command)

    def failing(command):
        return 0

    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap.subprocess, "call", call)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: None)
    return tmp_path, ran


def test_the_second_time_nothing_is_done_until_the_recipe_changes(checkout, capsys):
    root, ran = checkout
    words = [str(root / "venv"), "figures"]
    assert bootstrap.main(words) == 0
    assert [command[1:3] for command in ran] == [["-m", "venv"], ["-m", "pip"]]
    assert "To fetch: about" in capsys.readouterr().out
    for again in (words, words[:1]):
        ran.clear()
        assert bootstrap.main(again) == 0
        assert [command[1:] for command in ran] == [["-c", ""]]  # does its Python still start: that is all
        assert capsys.readouterr().out == ""
    for change in ("extras", "recipe"):  # what was asked for once stays, whoever asks later
        if change == "recipe":
            (root / "constraints.txt").write_text("torch==2.11.0\n")
        assert bootstrap.main([str(root / "venv"), "dev"]) == 0
        assert ran[-1][-1] == ".[dev,figures]"
        assert json.loads((root / "venv" / bootstrap.STAMP).read_text())["extras"] == ["dev", "figures"]
        ran.clear()


def test_a_failed_install_leaves_no_stamp_and_says_what_to_do(checkout, capsys, monkeypatch):
    root, _ = checkout
    noted = bootstrap.subprocess.call
    monkeypatch.setattr(
        bootstrap.subprocess,
        "call",
        lambda command, **more: noted(command, **more) or int("install" in command),
    )
    assert bootstrap.main([str(root / "venv")]) == 1
    assert "pip ended with code 1" in capsys.readouterr().err
    assert not (root / "venv" / bootstrap.STAMP).exists()


def test_uv_comes_first_and_pip_takes_over_where_it_fails(checkout, capsys, monkeypatch):
    root, ran = checkout
    noted = bootstrap.subprocess.call
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: "uv" if name == "uv" else None)
    monkeypatch.setattr(
        bootstrap.subprocess,
        "call",
        lambda command, **more: noted(command, **more) or int(command[0] == "uv"),
    )
    assert bootstrap.main([str(root / "venv")]) == 0
    assert ["uv" in command for command in ran if "install" in command] == [True, False]
    assert "now pip tries" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("venv", "cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv"),
        ("disk", "needs about 2 GB of disk"),
        ("python", "needs Python 3.10 or later, and"),
        ("moved", "no longer starts. Remove the environment"),
    ],
)
def test_what_set_up_lacks_is_said_before_anything_is_fetched(checkout, capsys, monkeypatch, broken, said):
    root, ran = checkout
    if broken == "venv":
        monkeypatch.setattr(bootstrap.subprocess, "call", lambda command, **more: 1)
    elif broken == "disk":
        monkeypatch.setattr(bootstrap, "free_gb", lambda place: 0.5)
    elif broken == "python":
        monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 18))
    else:
        (root / "venv/bin").mkdir(parents=True)
        bootstrap.venv_python(root / "venv").symlink_to(root / "gone")
    monkeypatch.setattr(bootstrap, "runs", lambda *command: False)
    assert bootstrap.main([str(root / "venv")]) == 1
    assert said in capsys.readouterr().err
    assert not any("install" in command for command in ran)


def test_an_environment_used_as_it_is_must_hold_all_that_is_needed(capsys, monkeypatch):
    assert bootstrap.main(["", "dev"]) == 0
    monkeypatch.setattr(bootstrap, "requirements", lambda extras: ["torch>=99", "no-such-package", "pytest"])
    assert bootstrap.main([""]) == 1
    assert re.search(r"lacks torch>=99 \(has .+\), no-such-package\. ", capsys.readouterr().err)


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=4),
    st.sampled_from(["", "+cpu", "rc1", ".dev3", ".post1"]),
)
def test_versions_compare_as_numbers(parts, rest):
    assert bootstrap.numbers(".".join(map(str, parts)) + rest) == tuple(parts)


@pytest.mark.parametrize("version", ["3.10.0", "3.11.0", "3.12.0", "3.13.0"])
@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_every_requirement_is_pinned_to_one_version_on_every_machine(version, system):
    machine = {"python_full_version": version, "python_version": version[:4], "sys_platform": system}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(text) for text in lines if not text.startswith("#")]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({**machine, "platform_machine": "x86_64"})]
    pinned = {pin.name: str(pin.specifier) for pin in here}
    assert len(pinned) == len(here)
    assert all(re.fullmatch(r"==[\d.]+", exact) for exact in pinned.values())
    for text in bootstrap.requirements({"figures", "eval", "dev"}):
        wanted = Requirement(text)
        assert wanted.specifier.contains(pinned[wanted.name].removeprefix("=="))


def test_the_test_command_runs_every_check():
    recipe = subprocess.run(["make", "-n", "test", "N=7"], cwd=ROOT, capture_output=True, text=True).stdout
    for check in (
        "ruff check .",
        "ruff format --check .",
        "-m mypy",
        "importlinter",
        "pytest -n auto --dist worksteal --examples 7",
        "bootstrap",
    ):
        assert check in recipe
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert "CI=true exec make test" in (ROOT / ".ci/run").read_text()


# ------------------------------------------------------------------------------------------ floors and tests


@pytest.mark.parametrize(
    ("file", "text", "kept"),
    [
        ("errors.py", "", True),
        ("errors.py", "import minispeed.chat\n", False),
        ("optim.py", "def late():\n    import minispeed.engine\n", False),
        ("zero.py", "import minispeed.tensor\n", False),
        ("engine.py", "import minispeed.testing\n", False),
        ("attic.py", "", False),
    ],
)
def test_the_floors_hold(tmp_path, file, text, kept):
    house = tmp_path / "minispeed"
    for room in ("", "chat", "testing"):
        (house / room).mkdir()
        (house / room / "__init__.py").touch()
    for name in ("errors.py", "optim.py", "engine.py", "zero.py", "tensor.py", "__main__.py"):
        (house / name).touch()
    (house / file).write_text(text)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", program, "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == kept, done.stdout


def test_torch_computes_with_one_thread():
    import torch

    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("words", [["--examples", "7"], ["--examples", "3"]])
def test_every_drawn_test_makes_n_draws(tmp_path, words):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "test_drawn.py").write_text(
        "from hypothesis import given, strategies as st\n"
        "draws = []\n"
        "@given(st.integers())\n"
        "def test_drawn(number):\n    draws.append(number)\n"
        "def test_count():\n    print('DRAWS', len(draws), draws)\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", str(tmp_path), *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={"CI": "true"},
        ).stdout
        for _ in range(2)
    ]
    drawn = [re.search(r"DRAWS (\d+) (.*)", output) for output in outputs]
    assert drawn[0].group(1) == words[1]
    assert drawn[0].group(2) == drawn[1].group(2)  # on CI the draws are always the same


def test_draws_below_one_are_refused():
    done = python("-m", "pytest", "--examples", "0", "--collect-only")
    assert "--examples must be at least 1; got 0" in done.stderr
