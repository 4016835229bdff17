"""Make ready an environment that minispeed runs in: `python tools/bootstrap.py VENV [EXTRA ...]`.

Creates the virtual environment VENV if it is not there, and installs this checkout in it with the extras, at
the versions in constraints.txt. A stamp in VENV holds the hash of what it was made from, so the second time
nothing is done. With VENV "" the Python that runs this is used as it is: only checked, nothing installed.
Standard library only.
"""

# No newer syntax than Python 3.6 has: under an old Python this must get as far as saying so.
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 10)
FREE = 2.0  # GB that must be free; the environment takes 1.3 with torch's CPU build
STAMP = "minispeed-stamp.json"


class Stop(Exception):
    """Set-up cannot go on; the message says why, and what to do."""


def main(argv):
    """Make the environment ready.  Returns the exit code."""
    venv, extras = argv[0], set(argv[1:])
    try:
        check_python(sys.version_info)
        if venv:
            make_ready(Path(venv), extras)
        else:
            check_present(extras)
    except Stop as stop:
        print("minispeed: {}".format(stop), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nminispeed: set-up stopped; the same command goes on with it.", file=sys.stderr)
        return 130
    return 0


def check_python(version):
    if tuple(version[:2]) < OLDEST:
        raise Stop(
            "needs Python 3.10 or later, and {} is {}.{}. Install a newer one, or name it: "
            "make demo PYTHON=python3.12".format(sys.executable, *version[:2])
        )


def make_ready(venv, extras):
    """Bring the environment to what the recipe says now, unless its stamp says that it is there."""
    stamp, key, python, uv = venv / STAMP, recipe_key(), venv_python(venv), shutil.which("uv")
    made = json.loads(stamp.read_text()) if stamp.exists() else {}
    if made.get("key") == key and extras <= set(made["extras"]) and runs(python):
        return
    extras |= set(made.get("extras", []))  # what another command installed stays
    if python.exists():
        print("minispeed: bringing {} up to date.".format(venv), flush=True)
    else:
        check_space(venv)
        print(announcement(venv, uv, sys.platform, has_gpu()), flush=True)
    create(venv, python, uv)
    install(python, extras, uv)
    stamp.write_text(json.dumps({"key": key, "extras": sorted(extras)}))


def recipe_key():
    """Hash all that an environment depends on: the two files, where the checkout is, which Python."""
    recipe = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    where = "{} {}".format(ROOT, platform.python_version()).encode()
    return hashlib.sha256(b"\0".join([*recipe, where])).hexdigest()


def venv_python(venv):
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def runs(python, *arguments):
    """Whether this Python starts and does what the arguments say."""
    command = [str(python), *(arguments or ("-c", ""))]
    try:
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def has_gpu():
    return bool(shutil.which("nvidia-smi")) or os.path.exists("/proc/driver/nvidia")


def check_space(venv):
    """Stop before a download that cannot end well."""
    free = free_gb(venv)
    if free < FREE:
        raise Stop(
            "set-up needs about {:.0f} GB of disk for {}, and {:.1f} GB are free. Free some, or name another "
            "place: make demo VENV=/elsewhere/venv".format(FREE, venv, free)
        )


def free_gb(place):
    """Return the free disk space, in GB, where this place is or will be."""
    there = next(parent for parent in [place.absolute(), *place.absolute().parents] if parent.exists())
    return shutil.disk_usage(str(there)).free / 1e9


def announcement(venv, uv, system, gpu):
    """Return what set-up is about to fetch, and how much of it: sums of the wheels' sizes."""
    lines = ["minispeed: setting up {} (once): torch and some smaller packages.".format(venv)]
    if system != "linux":
        lines.append("  To fetch: about 0.2 GB.")
    elif gpu:
        lines.append("  To fetch: about 2.8 GB (torch with CUDA).")
    elif uv:
        lines.append("  To fetch: about 0.3 GB (no NVIDIA GPU here, so torch's CPU build).")
    else:
        lines.append("  To fetch: about 2.8 GB, as pip on Linux takes torch with CUDA; 0.3 GB where it is set up to")
        lines.append("  take the CPU build. This machine shows no NVIDIA GPU: with uv on the path, it is 0.3 GB.")
    return "\n".join(lines)


def create(venv, python, uv):
    """Create the environment where there is none yet, with pip in it (or with uv at hand)."""
    if python.exists() or python.is_symlink():
        if not runs(python):
            raise Stop("{} no longer starts. Remove the environment and try again: rm -r {}".format(python, venv))
        if uv or runs(python, "-m", "pip", "--version") or runs(python, "-m", "ensurepip"):
            return
        raise Stop("{} has no pip. Remove it and try again: rm -r {}".format(venv, venv))
    was_there = venv.exists()
    if subprocess.call([sys.executable, "-m", "venv", str(venv)]) == 0:
        return
    if not was_there:
        shutil.rmtree(str(venv), ignore_errors=True)  # what the attempt left
    if uv and subprocess.call([uv, "venv", "--seed", "--python", sys.executable, str(venv)]) == 0:
        return
    raise Stop(
        "this Python ({}) cannot make virtual environments. On Debian and Ubuntu: sudo apt install "
        "python3-venv; elsewhere use another Python: make demo PYTHON=python3.12".format(sys.executable)
    )


def install(python, extras, uv):
    """Install this checkout and the extras at the pinned versions: by uv where there is one, else by pip."""
    python = str(python.absolute())
    what = ["-c", "constraints.txt", "-e", ".[{}]".format(",".join(sorted(extras))) if extras else "."]
    if uv:
        command = [uv, "pip", "install", "--python", python, "--build-constraints", "constraints.txt"]
        command += ["--torch-backend", "auto", *what]  # torch's CPU build where there is no GPU
        if subprocess.call(command, cwd=str(ROOT)) == 0:
            return
        print("minispeed: uv could not, for the reason above; now pip tries.", flush=True)
    pins = {name: "constraints.txt" for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}  # old pip, new pip
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", *what]
    code = subprocess.call(command, cwd=str(ROOT), env=dict(os.environ, **pins))
    if code:
        raise Stop(
            "set-up stopped: pip ended with code {}, for the reason above ({:.1f} GB of disk are free). Once "
            "that is mended, the same command goes on.".format(code, free_gb(Path(python)))
        )


def check_present(extras):
    """Stop if the Python that runs this lacks a package, naming all that it lacks."""
    from importlib import metadata

    lacking = []
    for requirement in requirements(extras):
        name, _, least = requirement.partition(">=")
        try:
            version = metadata.version(name)
            if least and numbers(version) < numbers(least):
                lacking.append("{} (has {})".format(requirement, version))
        except metadata.PackageNotFoundError:
            lacking.append(requirement)
    if lacking:
        raise Stop(
            "{} is to be used as it is, and lacks {}. Install that there, or leave out VENV= for an "
            "environment of minispeed's own.".format(sys.executable, ", ".join(lacking))
        )


def requirements(extras):
    """Return the package's requirements and those of the extras, as pyproject.toml lists them."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = [re.search(r"^{} = (\[.*\])$".format(name), text, re.M) for name in ["dependencies", *sorted(extras)]]
    return [requirement for one in lists for requirement in json.loads(one.group(1))]


def numbers(version):
    """Return a version as numbers that compare: "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(int(number) for number in re.match(r"[\d.]*\d", version).group().split("."))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
