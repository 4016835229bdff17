"""The command line: `minispeed COMMAND ...`, and what it says when something goes wrong.

A command is a line of the table below: what it does, its options, its function. They are imported when the
command is called for, so help and a typing mistake never wait for torch. The last words are always sentences:

    exit code   0    done (or the command's own code)
                1    a bug of ours; `--debug` shows where
                2    a mistake that the user can mend
                130  stopped by Ctrl-C
                141  the reader of our output went away, as in `| head`
                143  asked to end, by SIGTERM
"""

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from minispeed.errors import UserError, nearest
from minispeed.options import Options, page, parse
from minispeed.version import __version__


class Command(NamedTuple):
    """One line of help; where the options' class is, and the function that takes them ("module:name")."""

    line: str
    options: str
    function: str


COMMANDS = {
    name: Command(line, f"minispeed.chat.commands:{name.title()}Options", f"minispeed.chat.commands:{name}")
    for name, line in {
        "demo": "train a small model on bundled conversations, score it, talk to it",
        "prepare": "read conversations, tokenise them, and report what is in them",
        "show": "print conversations as the model sees them: what is learnt, what is context",
        "sft": "fine-tune a model on conversations",
        "eval": "score a trained model on held-out conversations",
        "chat": "talk to a trained model",
        "export": "write a trained model for transformers",
        "checkpoint": "list what checkpoints hold, and verify them",
        "plan": "say which layout to train a model with, and why",
        "explain": "say what a DeepSpeed configuration comes to, and what it costs",
        "timeline": "draw what each rank did when: of a run's trace, or of a simulated pipeline",
        "simulate": "say how long a step takes on a cluster that is not there, and draw it",
        "calibrate": "measure how fast this machine is, for planning and simulating",
        "doctor": "say what a bug report needs to know of this machine",
    }.items()
}

WAYS_OUT = {  # errno: what a user can do about it
    errno.ENOSPC: "free some space, or write to another place",
    errno.EACCES: "another place, or ask its owner for permission",
    errno.EPERM: "another place, or ask its owner for permission",
    errno.EROFS: "a place that can be written to",
    errno.ENOENT: "check the path",
    errno.EISDIR: "the path of a file in it",
    errno.ENOTDIR: "check the path",
    errno.EMFILE: "raise the limit on open files: ulimit -n 4096",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; default: this process's) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = run(words)
        sys.stdout.flush()  # so that a reader who went away is noticed here
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its exit
        return 141
    except KeyboardInterrupt:
        print("\nminispeed: stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        code, what, fix = explain(error)
        if "--debug" in words:
            traceback.print_exc()
        print(f"minispeed: {what}", *([f"  try: {fix}"] if fix else []), sep="\n", file=sys.stderr)
        return code


def run(words: list[str]) -> int:
    """Do what the words say and return the exit code, or raise."""
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"minispeed {__version__}")
        return 0
    if name == "--options":
        print(page({command: options_class(command) for command in COMMANDS}), end="")
        return 0
    if name not in COMMANDS:
        if name.startswith("-"):
            raise UserError(f"{name} comes before the command", fix=f"minispeed COMMAND {name}")
        raise UserError(f"there is no command {name!r}", fix=f"minispeed {nearest(name, COMMANDS) or '--help'}")
    options = parse(words[1:], options_class(name), commands=COMMANDS)
    return found(COMMANDS[name].function)(options) or 0


def help_text() -> str:
    """Return what `minispeed --help` prints."""
    lines = [f"  {name:10} {command.line}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "DeepSpeed you can read: chat fine-tuning and the techniques under it, in pure PyTorch.",
            "\nusage: minispeed COMMAND [options]\n",
            *lines,
            "\nminispeed COMMAND --help   shows the options of a command, with an example",
            "minispeed --options        prints every option of every command, as Markdown",
            "minispeed --version        prints the version",
            "\nThe place to start: minispeed demo",
        ]
    )


def options_class(command: str) -> type[Options]:
    """Import the class of a command's options."""
    return found(COMMANDS[command].options)


def found(place: str) -> Any:
    """Import what stands at "module:name"."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def explain(error: Exception) -> tuple[int, str, str]:
    """Return exit code, what went wrong in a sentence, and what to try ("" where nothing will help)."""
    if isinstance(error, UserError):
        return 2, error.what, error.fix
    if isinstance(error, ModuleNotFoundError) and not (error.name or "minispeed").startswith("minispeed"):
        return 2, f"the package {error.name} is not installed", f"python -m pip install {error.name}"
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename is not None else ""
        what = f"{error.strerror or type(error).__name__}{where}"
        return 2, what, WAYS_OUT.get(error.errno, "the command again with --debug, to see what it was doing")
    what = " ".join(f"{type(error).__name__} {error}".split())
    return 1, f"this is a bug in minispeed: {what}", "the command again with --debug, for the traceback"


if __name__ == "__main__":
    sys.exit(main())
