"""Make sure that all ranks were started with the same, and say what differs if they were not.

Ranks with different options do not fail: they wait for each other for ever, or train different models. So each writes
what it has as names and values; a short fingerprint is compared, and only where it differs are the texts exchanged.
"""

import hashlib
import json
from collections.abc import Mapping

from minispeed.collective.group import Group
from minispeed.collective.numbers import everyones, texts_of
from minispeed.errors import UserError


def agree(group: Group, values: Mapping[str, object]) -> None:
    """Return if every rank brings the same names and values.

    Sends   8 bytes per rank; where ranks differ, the values
    Raises  UserError on every rank: the first name that differs, its value on rank 0 and on the first other rank
    """
    text = json.dumps({name: str(value) for name, value in values.items()})
    fingerprint = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    fingerprints = everyones(group, [fingerprint]).flatten().tolist()
    different = [rank for rank, other in enumerate(fingerprints) if other != fingerprints[0]]
    if not different:
        return
    texts = texts_of(group, text)
    first, other = (json.loads(texts[rank]) for rank in (0, different[0]))
    for name in {**first, **other}:
        mine, theirs = first.get(name, "not there"), other.get(name, "not there")
        if mine != theirs:
            raise UserError(
                f"ranks 0 and {different[0]} were started differently: {name} is {mine} on rank 0, "
                f"{theirs} on rank {different[0]}",
                fix="the same model, options and code on every rank",
            )
    raise UserError(f"ranks 0 and {different[0]} name the same things in another order", fix="one order on every rank")
