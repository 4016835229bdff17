"""Say how many bytes come and go beside what is held: logits, gathered units, gradients on their way.

Letters: V vocabulary of a rank, D model; e bytes of an element, w in fp32 or wider.
"""

from collections.abc import Sequence

from minispeed.ledger.layers import Setting

CHUNK = 1024  # tokens whose logits exist at once


def logits(of: Setting, supervised: int) -> int:
    """Return what the loss's backward needs beside what is kept: logits, and the gradients of features and head.

    A chunk's logits, their softmax and its product with the losses' gradients, in w bytes, cast at the end; of the
    chunk before there are the logits until its own are made, and the gradients of those until it has its own.
    """
    e, w, D = of.e, of.w, of.config.model_dim
    V, cast = -(-of.config.vocab_size // of.t), e * (e < w)
    one = min(CHUNK, max(1, supervised)) * V
    last = (supervised - 1) % CHUNK + 1 if supervised else 1
    two = min(CHUNK, max(0, supervised - CHUNK)) * V  # in the second chunk
    in_chunks = max(one * (3 * w + cast), one * (w + e) + two * (w + cast), one * e + two * (3 * w + cast))
    at_end = last * V * (w + e) + V * D * e
    return V * D * w + supervised * D * e + max(in_chunks, at_end)


def rooms(sizes: Sequence[int], *, overlap: bool = True) -> int:
    """Return the memory that whole gradients pass through, unit after unit, and which is never given back.

    Each takes the smallest free room that it fits in, or a new one; backward after backward, until none is new.

    sizes     bytes of the units in the order of their reductions
    overlap   a unit's room is free when the next one has collected its gradients: else at once
    """
    free: list[int] = []
    before = -1
    while sum(free) > before:
        before, busy = sum(free), 0
        for size in sizes:
            room = min((one for one in free if one >= size), default=0)
            if room:
                free.remove(room)
            if busy:
                free.append(busy)
            busy = room or size
            if not overlap:
                free.append(busy)
                busy = 0
        free += [busy] * (busy > 0)
    return before
