"""The topics' scripts, and the benchmarks that they use, can be imported by the tests of this folder."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
for folder in (BENCHMARKS, BENCHMARKS / "papers"):
    sys.path.insert(0, str(folder))
