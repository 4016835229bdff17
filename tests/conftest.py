"""What holds for every test: one thread, no world, one number of draws, and a GPU or a skip that says so."""

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import Phase, settings

# Before torch is first imported, here and in the processes that tests start: sums are cut in the same places
# on every machine, and tests that run ranks side by side do not fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--examples", type=int, default=50, metavar="N", help="draws per drawn test (default: 50)")
    parser.addoption("--first-failure", action="store_true", help="show the first draw that fails; look for no smaller")


def pytest_configure(config: pytest.Config) -> None:
    """Give every drawn test N draws: new ones each time, so that they add up; the same where CI is set."""
    examples = config.getoption("--examples")
    if examples < 1:
        raise pytest.UsageError(f"--examples must be at least 1; got {examples}")
    phases = (Phase.explicit, Phase.generate) if config.getoption("--first-failure") else settings().phases
    settings.register_profile(
        "minispeed", max_examples=examples, deadline=None, derandomize="CI" in os.environ, phases=phases
    )
    settings.load_profile("minispeed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """A script's world, and the threads it computes with, are its process's: the next test begins as the first did."""
    yield
    world = sys.modules.get("minispeed.collective.world")
    if world is not None and world.settled_world() is not None:
        world.settle(None)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
