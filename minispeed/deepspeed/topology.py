"""Ranks as points of a box whose axes have names, with DeepSpeed's calls: which rank is where, and who is in line.

    topology = PipeDataParallelTopology(num_pp=2, num_dp=3)
    topology.get_rank(pipe=1, data=0)                        3: the last axis runs fastest
    topology.get_axis_comm_lists("pipe")                     [[0, 3], [1, 4], [2, 5]]

Pure arithmetic: nobody has to be there. `minispeed/mesh.py` is the same with our axes.

https://deepspeed.readthedocs.io/en/latest/pipeline.html#module-deepspeed.runtime.pipe.topology
"""

from collections import namedtuple
from collections.abc import Sequence
from itertools import product
from typing import Any

from minispeed.errors import UserError, nearest

_tuple_class: Any = namedtuple  # of names that are known only when it is called


class ProcessTopology:
    """A box of ranks: `axes` are names from slow to fast, `dims` their lengths."""

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        """Number the ranks.  Raises UserError unless every axis has a length of 1 or more"""
        if len(axes) != len(dims) or any(length < 1 for length in dims):
            raise UserError(f"axes {list(axes)} with the lengths {list(dims)}", fix="1 or more for each axis")
        self.axes, self.dims = list(axes), list(dims)
        self.ProcessCoord = _tuple_class("ProcessCoord", self.axes)
        points = product(*(range(length) for length in dims))
        self.mapping = {self.ProcessCoord(*point): rank for rank, point in enumerate(points)}

    def world_size(self) -> int:
        """Return the number of ranks."""
        return len(self.mapping)

    def get_axis_names(self) -> list[str]:
        """Return the names of the axes, slow to fast."""
        return self.axes

    def get_dim(self, axis: str) -> int:
        """Return the length of an axis; 0 of one that is not there."""
        return dict(zip(self.axes, self.dims)).get(axis, 0)

    def get_rank(self, **coord_kwargs: int) -> int:
        """Return the rank at a point, of which every axis is given.  Raises UserError where there is none"""
        points = self.filter_match(**coord_kwargs)
        if len(points) != 1 or len(coord_kwargs) != len(self.axes):
            at = ", ".join(f"{axis}={place}" for axis, place in coord_kwargs.items())
            raise UserError(f"no single rank is at {at or 'nowhere'}", fix=f"a place below {self.dims} on {self.axes}")
        return points[0]

    def get_coord(self, rank: int) -> Any:
        """Return where a rank is: `.pipe`, `.data`, by the axes' names.  Raises UserError if there is no such rank"""
        if not 0 <= rank < len(self.mapping):
            raise UserError(f"rank {rank} of {len(self.mapping)}", fix=f"0..{len(self.mapping) - 1}")
        return list(self.mapping)[rank]

    def get_rank_repr(
        self, rank: int, omit_axes: Sequence[str] = ("data", "pipe"), inner_sep: str = "_", outer_sep: str = "-"
    ) -> str:
        """Return where a rank is as text: "model_00"."""
        coord = self.get_coord(rank)._asdict().items()
        return outer_sep.join(f"{axis}{inner_sep}{place:02d}" for axis, place in coord if axis not in omit_axes)

    def filter_match(self, **filter_kwargs: int) -> list[int]:
        """Return the ranks at these places on these axes.  Raises UserError on an axis that is not there"""
        for axis in filter_kwargs:
            if axis not in self.axes:
                raise UserError(f"no axis is called {axis!r}", fix=nearest(axis, self.axes) or ", ".join(self.axes))
        wanted = filter_kwargs.items()
        return [rank for point, rank in self.mapping.items() if all(getattr(point, axis) == at for axis, at in wanted)]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """Return the ranks at place `idx` of an axis."""
        return self.filter_match(**{axis: idx})

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """Return the groups along an axis: ranks that differ there alone; none where there is no such axis."""
        if axis not in self.axes:
            return []
        lines: dict[Any, list[int]] = {}
        for point, rank in self.mapping.items():
            lines.setdefault(point._replace(**{axis: 0}), []).append(rank)
        return list(lines.values())

    def __str__(self) -> str:
        return str(self.mapping)


class PipeDataParallelTopology(ProcessTopology):
    """Pipelines, and copies of them."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        """Let neighbours hold copies of one stage."""
        super().__init__(["pipe", "data"], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """The same with layers that are cut by width."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        """Let neighbours share layers."""
        super().__init__(["pipe", "data", "model"], [num_pp, num_dp, num_mp])
