"""Let a parameter be there while its elements are not.

A released parameter keeps its name, its place in the model and in autograd's graph, and gives up its memory. What may
be asked of it then is sorted by what it needs: shape, dtype, hooks need no elements, and are answered as if it were
whole; everything else reads elements, and whoever released it decides whether they can be had. So nothing reads freed
memory, and nobody mistakes an empty tensor for the parameter.

torch's extension by `__torch_function__`: https://docs.pytorch.org/docs/stable/notes/extending.html
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minispeed.errors import UserError

_WAYS = "reading it inside the model's forward, or in `with GatheredParameters(parameters):`"
_PLAIN: set[Any] = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.__hash__}
_FLAGS = "is_leaf is_cuda is_cpu is_meta is_sparse is_quantized"
for _name in f"requires_grad dtype device layout grad grad_fn itemsize {_FLAGS}".split():
    _PLAIN |= {getattr(Tensor, _name).__get__, getattr(Tensor, _name).__set__}
_PLAIN |= {Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.get_device, Tensor.requires_grad_}
_PLAIN |= {torch.is_floating_point, torch.is_complex}
_OF_SHAPE: set[Any] = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.stride}
_OF_SHAPE |= {Tensor.is_contiguous, torch.numel}
_OF_SHAPE |= {getattr(Tensor, _name).__get__ for _name in ("shape", "ndim", "nbytes")}


class Owner(Protocol):
    """Whoever holds the elements of released parameters: what `GatheredParameters` needs of it."""

    pins: int  # who wants them whole for a while: `reshard` waits for that to be over

    @property
    def is_released(self) -> bool:
        """Whether the parameters' elements are elsewhere."""

    def unshard(self) -> None:
        """Make them whole on this rank."""

    def reshard(self) -> None:
        """Release them, as they were before `unshard` or `take`."""

    def let_go(self) -> None:
        """Release them so that views of them stay readable: copies of what they were."""

    def take(self, root: int) -> None:
        """Make the values that rank `root` has now everybody's."""


def owner_of(p: Tensor) -> Owner | None:
    """Return who holds a parameter, released or not; None if nobody ever took it over."""
    return getattr(type(p), "owner", None)


def classes(
    owner: Owner, shapes: Mapping[int, tuple[str, tuple[int, ...]]], read: Callable[[Any, Callable[[], Any]], Any]
) -> tuple[type[nn.Parameter], type[nn.Parameter]]:
    """Make the classes that an owner's parameters have while they are whole, and while they are released.

    shapes  name and shape of each, by id
    read    is given a function of torch's and the call of it that reads a released one: makes it whole and calls, or
            raises LookupError, which becomes a UserError that names the parameter
    """

    class Present(nn.Parameter):
        pass

    class Absent(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name, shape = next((shapes[id(one)] for one in args if id(one) in shapes), ("", ()))
            if func in _OF_SHAPE and name:
                return func(torch.empty(shape, device="meta", dtype=args[0].dtype), *args[1:], **kwargs)
            if func in _PLAIN:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func is Tensor.__repr__:
                return f"released parameter {name} of shape {tuple(shape)}"
            try:
                return read(func, lambda: func(*args, **kwargs))
            except LookupError:
                what = f"parameter {name or next(iter(shapes.values()))[0]} is released"
                raise UserError(f"{what}: its elements are spread over the ranks", fix=_WAYS) from None

    Present.owner = Absent.owner = owner  # type: ignore[attr-defined]
    return Present, Absent


@contextmanager
def plainly() -> Iterator[None]:
    """Do the book-keeping unseen by autograd and by whoever watches operations."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        yield
