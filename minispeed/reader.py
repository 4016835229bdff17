"""Let a model that lies in parts read and write: generation with a cache, under any layout.

Every rank is given the same prompts and chooses the same tokens. The stages of a pipeline run one after another, each
with a cache of its own; the last one's scores go to all. Ranks that share rows or the stream's tokens hold whole ones
meanwhile: one new token cannot be cut.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minispeed.axes import Layout
from minispeed.model.cache import Cache
from minispeed.model.chunk import Chunk
from minispeed.model.config import GPTConfig
from minispeed.model.generate import Reader
from minispeed.model.gpt import GPT
from minispeed.parts import Lines, Part
from minispeed.pipeline.actions import Program
from minispeed.pipeline.bundle import Bundle
from minispeed.pipeline.execute import execute
from minispeed.pipeline.messages import forward_only
from minispeed.pipeline.stage import Stage
from minispeed.sequence.cut import SequenceCut
from minispeed.tensor.stream import whole_rows


@contextlib.contextmanager
def reading(
    parts: Sequence[Part], layout: Layout, lines: Lines, sequence: SequenceCut | None, device: torch.device
) -> Iterator[Reader]:
    """Make a GPT ready to read whole rows on every rank, which all call it alike."""
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.sharded.gathered())
            stack.enter_context(whole_rows(part.sharded.module))
        if sequence is not None:
            stack.enter_context(sequence.whole_rows())
        module = parts[0].sharded.module
        yield module if isinstance(module, GPT) else PipelineReader(parts, layout, lines, device)


class PipelineReader:
    """A GPT whose stages lie on the ranks of a pipeline."""

    def __init__(self, parts: Sequence[Part], layout: Layout, lines: Lines, device: torch.device) -> None:
        self.chunks: dict[int, Chunk] = {}
        for part in parts:
            assert isinstance(part.sharded.module, Chunk)
            self.chunks[part.stage] = part.sharded.module
        self.config: GPTConfig = next(iter(self.chunks.values())).config
        self.group, self.device = lines.pp, device
        self.programs: list[Program] = forward_only(layout.programs(layout.pp))

    def new_cache(self, capacity: int) -> list[Cache]:
        """Return room for so many tokens in each stage on this rank."""
        return [Cache(capacity) for _ in self.chunks]

    def next_logits(self, tokens: Tensor, *, cache: list[Cache], **rows: Any) -> Tensor:
        """Return the scores of what follows the last token, the same on all ranks.  (B, T) -> (B, V)"""
        caches = dict(zip(self.chunks, cache, strict=True))
        found = torch.empty(len(tokens), self.config.vocab_size, dtype=self._dtype, device=self.device)

        def read(stage: int, inputs: Bundle, micro: int) -> Bundle:
            return self.chunks[stage].features(inputs, tokens, cache=caches[stage], **rows)

        def score(micro: int, outputs: Bundle) -> None:
            found.copy_(self.chunks[max(self.chunks)].head(outputs[0][:, -1]))

        stages = {stage: Stage(run=partial(read, stage)) for stage in self.chunks}
        one = [[action for action in program if action.micro == 0] for program in self.programs]
        execute(one, stages, self.group, observe=score, device=self.device)
        self.group.broadcast(found, self.group.size - 1).wait()
        return found

    @property
    def _dtype(self) -> torch.dtype:
        return next(p.dtype for chunk in self.chunks.values() for p in chunk.parameters())
