"""Read and write counts and sizes as people do: 124M parameters, 24GB of memory.

124M, 1.3B, 7e9        numbers: K, M, B (or G), T are powers of a thousand
24GB, 24 gb, 24G, 24e9   bytes: powers of a thousand, as manufacturers count
24GiB                    bytes: powers of 1024, as systems do
"""

import re

from minispeed.errors import UserError

THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e\d{1,2})?) ?([a-z]*)", re.IGNORECASE)


def parse_count(text: str) -> int:
    """Return a number that is written like 124M or 1.3B.

    Raises  UserError with the text, and how it is written, if it is none or 0
    """
    count = _read(text, THOUSANDS)
    if not count:
        raise UserError(f"a number is written like 124M, 1.3B or 7e9; got {text!r}", fix="124M")
    return count


def parse_size(text: str) -> int:
    """Return a number of bytes that is written like 24GB, 24GiB, 24G or 24e9.

    Raises  UserError with the text, and how it is written, if it is none or 0
    """
    decimal = {letter + ending: THOUSANDS[letter] for letter in ("", "K", "M", "G", "T") for ending in ("", "B")}
    binary = {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}
    size = _read(text, decimal | binary)
    if not size:
        raise UserError(f"a size is written like 24GB, 24GiB, 512MB or 24e9; got {text!r}", fix="24GB")
    return size


def spell_size(size: float) -> str:
    """Return bytes in the decimal unit that suits them, four digits at most: "24 GB"."""
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size >= 999.5:
            size, unit = size / 1000, larger
    return f"{size:.4g} {unit}"


def _read(text: str, units: dict[str, int]) -> int:
    """Return a number times its unit, 0 where the text is not one and the other."""
    found = NUMBER.fullmatch(text.strip().replace("_", "").replace(",", ""))
    return round(float(found[1]) * units.get(found[2].upper(), 0)) if found else 0
