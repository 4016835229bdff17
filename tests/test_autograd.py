"""Laws of the differentiable collectives: the gradient of the whole cluster, as one function, is right."""

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed.collective import autograd
from minispeed.collective.group import SoloGroup
from minispeed.collective.launch import launch
from minispeed.errors import UserError
from minispeed.testing.strategies import seeds

N, L = 3, 2  # ranks, and the length of one slice


class Cluster(torch.autograd.Function):
    """A function of what all ranks put in, (N, ..): its value and gradient come from ranks that run `step`.

    step  (x of this rank, group) -> this rank's term of the loss; the terms are added
    """

    @staticmethod
    def forward(ctx, inputs, step):
        def run(world):
            x = inputs[world.rank].clone().requires_grad_()
            with torch.enable_grad():
                term = step(x, world.group)
            (grad,) = torch.autograd.grad(term, x)
            return term.detach(), grad

        terms, grads = zip(*launch(run, ranks=len(inputs)), strict=True)
        ctx.save_for_backward(torch.stack(grads))
        return torch.stack(terms).sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def weights(shape, rank):
    """Something that makes every element, and where asked every rank, count differently."""
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) + 10 * rank).view(shape)


def own(y, group):
    """A loss in which each rank uses its result in its own way; squares: its gradient depends on it."""
    return (weights(y.shape, group.rank) * y**2).sum()


def shared(y, group):
    """One loss that all ranks compute alike: it counts once."""
    return (weights(y.shape, 0) * y**2).sum()


OWN_USE = {
    "all_gather": lambda x, g, dim: autograd.all_gather(x, g, dim=dim, copies=False),
    "reduce_scatter": lambda x, g, dim: autograd.reduce_scatter(x, g, dim=dim),
    "all_to_all": lambda x, g, dim: autograd.all_to_all(x, g, cut_dim=dim, join_dim=1 - dim),
}


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("name", OWN_USE)
def test_pairs_whose_results_are_used_by_each_rank_in_its_own_way(name, dim):
    inputs = weights((N, N * L, N), 0).requires_grad_()
    step = lambda x, g: own(OWN_USE[name](x, g, dim % 2 if name == "all_to_all" else dim), g)  # noqa: E731
    assert torch.autograd.gradcheck(lambda x: Cluster.apply(x, step), inputs)


def whole_and_gradients(step, x, *, sliced):
    """Run `step` on ranks that share one loss; return the ranks' losses and gradients."""

    def run(world):
        mine = (x[world.rank] if sliced else x).clone().requires_grad_()
        loss = step(mine, world.group)
        return loss.detach(), torch.autograd.grad(loss, mine)[0]

    losses, grads = zip(*launch(run, ranks=N), strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)  # they do share it
    return losses[0], torch.stack(grads)


class SharedLoss(torch.autograd.Function):
    """One loss that every rank computes; the gradient of what rank r put in is what rank r computes."""

    @staticmethod
    def forward(ctx, x, step, sliced):
        with torch.enable_grad():
            loss, grads = whole_and_gradients(step, x, sliced=sliced)
        if not sliced:  # every rank put in the same x, so every rank must hold its whole gradient
            assert all(torch.equal(grad, grads[0]) for grad in grads)
            grads = grads[0]
        ctx.save_for_backward(grads)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None


SLICES_TO_SHARED = {
    "all_reduce": lambda x, g: shared(autograd.all_reduce(x, g), g),
    "all_gather of copies": lambda x, g: shared(autograd.all_gather(x, g, dim=1, copies=True), g),
}
COPIES_TO_SHARED = {
    "copy": lambda x, g: shared(autograd.all_reduce(weights(x.shape, g.rank) * autograd.copy(x, g), g), g),
    "split": lambda x, g: shared(
        autograd.all_reduce(autograd.split(x, g, dim=1) ** 2 * weights((N * L, 1), g.rank), g), g
    ),
}


@pytest.mark.parametrize("name", SLICES_TO_SHARED)
def test_pairs_that_lead_from_each_ranks_own_value_to_one_loss(name):
    inputs = weights((N, N * L, N), 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SharedLoss.apply(x, SLICES_TO_SHARED[name], True), inputs)


@pytest.mark.parametrize("name", COPIES_TO_SHARED)
def test_pairs_that_lead_from_one_value_on_all_ranks_to_one_loss(name):
    inputs = weights((N * L, N), 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SharedLoss.apply(x, COPIES_TO_SHARED[name], False), inputs)


@given(st.integers(1, 4), st.integers(0, 2), st.integers(0, 3), st.integers(0, 3), seeds)
def test_gathers_and_scatters_are_inverse_or_sums(n, dim, length, rest, seed):
    def run(world):
        shape = [rest + 1] * 3
        shape[dim] = length
        whole_shape = list(shape)
        whole_shape[dim] = n * length
        x = torch.full(shape, float(world.rank + seed % 7))
        gathered = autograd.all_gather(x, world.group, dim=dim, copies=True)
        assert list(gathered.shape) == whole_shape
        assert torch.equal(autograd.split(gathered, world.group, dim=dim), x)
        assert torch.equal(autograd.reduce_scatter(gathered, world.group, dim=dim), n * x)
        other = (dim + 1) % 3
        there = autograd.all_to_all(gathered, world.group, cut_dim=dim, join_dim=other)
        assert torch.equal(autograd.all_to_all(there, world.group, cut_dim=other, join_dim=dim), gathered)

    launch(run, ranks=n)


def test_gradients_can_be_differentiated_again():
    def run(world):
        x = torch.tensor([1.0 + world.rank, 3.0], dtype=torch.float64, requires_grad=True)
        y = autograd.all_gather(x, world.group, copies=False)
        (grad,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), x)
        return x.detach(), grad.detach(), second

    for x, grad, second in launch(run, ranks=2):
        assert torch.equal(grad, 2 * 3 * x**2)  # both ranks use every element
        assert torch.equal(second, 2 * 6 * x)


def test_one_rank_is_the_identity():
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    group = SoloGroup()
    y = autograd.reduce_scatter(autograd.all_gather(autograd.copy(x, group), group, copies=False), group, dim=1)
    z = autograd.all_to_all(autograd.split(autograd.all_reduce(y, group), group), group, cut_dim=0, join_dim=1)
    z.sum().backward()
    assert torch.equal(z, x)
    assert torch.equal(x.grad, torch.ones(2, 3))


def test_an_uneven_cut_names_both_numbers():
    with pytest.raises(UserError, match=r"dim 1 has 5 elements, which group=2 does not divide"):
        launch(lambda world: autograd.split(torch.ones(2, 5), world.group, dim=1), ranks=2)
