"""Laws of the optimizers: ours are torch's, the fused kernels are the loops, a shard allows what is element-wise."""

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from minispeed.errors import UserError
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.optim import NEVER, NOT_ELEMENTWISE, SGD, Adam, AdamW, check_elementwise, decay_groups

settings_of_adam = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-5, 1e-2),
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
        "eps": st.floats(1e-8, 1e-4),
        "weight_decay": st.floats(0, 0.3),
    }
)
settings_of_sgd = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-5, 1e-2),
        "momentum": st.just(0.0) | st.floats(0.01, 0.99),
        "weight_decay": st.floats(0, 0.3),
    }
)
ADAMS = {AdamW: torch.optim.AdamW, Adam: torch.optim.Adam}
IN_TORCH = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
TORCHS = [kind for kind in IN_TORCH if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer]


def train(make, seed: int, steps: int) -> list[torch.Tensor]:
    """Return parameters of drawn gradients after some steps; the second parameter has none in the first step."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 2), (5,), (0,)]
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
    optimizer = make(params)
    for step in range(steps):
        for index, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = None if index == 1 and step == 0 else gradient
        optimizer.step()
    return [p.detach() for p in params]


def check_equal(ours, theirs, seed: int, steps: int) -> None:
    for got, expected in zip(train(ours, seed, steps), train(theirs, seed, steps), strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ADAMS)
@pytest.mark.parametrize("fused", [True, False])
@given(values=settings_of_adam, seed=st.integers(0, 2**31), steps=st.integers(1, 4))
def test_our_adams_are_torchs(kind, fused, values, seed, steps):
    check_equal(
        lambda params: kind(params, fused=fused, **values),
        lambda params: ADAMS[kind](params, foreach=False, **values),
        seed,
        steps,
    )


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@given(values=settings_of_sgd, seed=st.integers(0, 2**31), steps=st.integers(1, 4))
def test_our_sgd_is_torchs(nesterov, fused, values, seed, steps):
    values["nesterov"] = nesterov and values["momentum"] > 0
    check_equal(
        lambda params: SGD(params, fused=fused, **values),
        lambda params: torch.optim.SGD(params, foreach=False, **values),
        seed,
        steps,
    )


@pytest.mark.parametrize("ours, theirs", [(Adam, torch.optim.Adam), (SGD, torch.optim.SGD)])
def test_what_is_not_set_is_as_in_torch(ours, theirs):
    mine, other = (kind([torch.ones(1)]).defaults for kind in (ours, theirs))
    assert all(other[name] == value for name, value in mine.items() if name != "fused")


@pytest.mark.parametrize("kind", [AdamW, Adam, SGD])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_leaves_the_gradient_and_returns_the_closures_loss(kind, fused):
    p = nn.Parameter(torch.tensor([1.0, 2.0]))

    def closure():
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert kind([p], weight_decay=0.1, fused=fused).step(closure) == 5.0
    assert p.grad.tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    "make, held",
    [
        (AdamW, {"step", "exp_avg", "exp_avg_sq"}),
        (Adam, {"step", "exp_avg", "exp_avg_sq"}),
        (lambda params: SGD(params, momentum=0.9), {"momentum_buffer"}),
        (SGD, set()),
    ],
)
def test_the_state_survives_a_save(make, held):
    model = nn.Linear(2, 2)
    optimizer = make(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    again = make(model.parameters())
    again.load_state_dict(optimizer.state_dict())
    before, after = (each.state_dict()["state"][0] for each in (optimizer, again))
    assert before.keys() == held
    assert all(torch.equal(before[name], after[name]) and before[name].any() for name in held)


def test_matrices_decay_and_vectors_do_not():
    model = GPT(preset("nano", qkv_bias=True))
    model.norm.weight.requires_grad_(False)
    decayed, kept = decay_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(decayed["names"] + kept["names"]) == sorted(trainable)
    assert all("norm" in name or "bias" in name for name in kept["names"])


def allows(kind: type[torch.optim.Optimizer], stage: int) -> bool:
    try:
        check_elementwise(kind([nn.Parameter(torch.ones(2, 2))]), stage)
    except UserError:
        return False
    return True


def test_the_refused_are_those_that_torch_has():
    """The stages from which each is refused, said by the class; every other of torch's passes everywhere."""
    names = [{kind.__name__ for kind in TORCHS if not allows(kind, stage)} for stage in range(4)]
    never, whole = {"SparseAdam"}, {"Muon", "Adafactor", "LBFGS"}
    there = {kind.__name__ for kind in TORCHS}
    assert names == [never & there] + 3 * [(never | whole) & there]
    assert never == NEVER.keys() and whole == NOT_ELEMENTWISE.keys()


@pytest.mark.parametrize("kind", [*filter(lambda kind: allows(kind, 1), TORCHS), AdamW, Adam, SGD])
def test_what_a_shard_allows_computes_the_same_in_pieces(kind):
    assert torch.allclose(moved(kind, 1), moved(kind, 5), rtol=0, atol=1e-12)


def test_adafactor_in_pieces_is_another_optimizer():
    assert not torch.allclose(moved(torch.optim.Adafactor, 1), moved(torch.optim.Adafactor, 5), rtol=0, atol=1e-5)


def moved(kind, pieces: int) -> torch.Tensor:
    """Return a matrix after three steps, whole or cut in flat pieces."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    params = [nn.Parameter(part) for part in (whole.flatten().chunk(pieces) if pieces > 1 else [whole])]
    optimizer = kind(params, lr=0.01)
    for _ in range(3):
        gradients = torch.randn(12, generator=generator, dtype=torch.float64).chunk(pieces)
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient.view_as(p)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


@pytest.mark.parametrize(
    "kind, stage, message",
    [
        ("Muon", 1, "Muon looks at whole matrices, and from ZeRO stage 1 on.*flat pieces.*try: ZeRO stage 0, or AdamW"),
        ("Adafactor", 3, "Adafactor looks at rows and columns"),
        ("LBFGS", 1, "LBFGS looks at all parameters at once.*flat pieces.*try: ZeRO stage 0, or AdamW"),
        ("SparseAdam", 0, "SparseAdam needs sparse gradients.*dense"),
    ],
)
def test_a_refusal_says_why(kind, stage, message):
    optimizer = getattr(torch.optim, kind)([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(UserError, match=message):
        check_elementwise(optimizer, stage)


@pytest.mark.parametrize("kind", [AdamW, Adam, SGD])
def test_wrong_values_are_named(kind):
    for wrong in ("lr", "weight_decay"):
        with pytest.raises(UserError, match=f"{kind.__name__} got .*{wrong} -1"):
            kind([torch.ones(1)], **{wrong: -1})


def test_wrong_values_of_one_kind_are_named():
    with pytest.raises(UserError, match=r"Adam got .*betas \(0.9, 1.0\)"):
        Adam([torch.ones(1)], betas=(0.9, 1.0))
    with pytest.raises(UserError, match="SGD got .*momentum -1"):
        SGD([torch.ones(1)], momentum=-1)
    with pytest.raises(UserError, match="nesterov and no momentum; try: momentum=0.9"):
        SGD([torch.ones(1)], nesterov=True)
