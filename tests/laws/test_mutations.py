"""The list of what `mutate.py` breaks follows the code: each line that it would replace is there, once."""

from pathlib import Path

import pytest
from mutate import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_what_it_would_break_is_there_once(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.before) == 1
    assert mutation.before != mutation.after
    assert Path(ROOT / mutation.test.partition("::")[0]).exists()
