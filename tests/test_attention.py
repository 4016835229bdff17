"""Laws of attention: three implementations, one function; memory linear in T where it is promised."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from minispeed.errors import UserError
from minispeed.model.attention import IMPLEMENTATIONS, by_documents, fused, implementation, reference, tiled
from minispeed.model.mask import Mask


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], Mask]:
    """Draw q, k, v and a mask that leaves every query a key: its own position, or for a cross mask any."""
    batch, groups, shares = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_queries, offset, dim = draw(st.integers(1, 9)), draw(st.integers(0, 5)), draw(st.integers(1, 5))
    num_keys = offset + num_queries
    causal, packed = draw(st.booleans()), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = [(batch, groups * shares, num_queries, dim), *[(batch, groups, num_keys, dim)] * 2]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    keys = torch.randint(0, 3, (batch, num_keys), generator=generator).sort().values if packed else None
    queries = None if keys is None else keys[:, offset:]
    mask = Mask(num_queries, num_keys, causal=causal, offset=offset, queries=queries, keys=keys)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()], mask


def outputs(attention, inputs: list[Tensor], mask: Mask, seed: int) -> list[Tensor]:
    """Return the output and the gradients of its product with fixed random numbers."""
    out = attention(*inputs, mask)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@given(problems(), st.integers(1, 12), st.integers(0, 2**31))
def test_three_attentions_are_one(problem, tile, seed):
    inputs, mask = problem
    expected = outputs(reference, inputs, mask, seed)
    for attention in (fused, lambda q, k, v, m: tiled(q, k, v, m, tile=tile)):
        for got, wanted in zip(outputs(attention, inputs, mask, seed), expected, strict=True):
            assert (got - wanted).abs().max() <= 1e-12 * max(1, wanted.abs().max().item())


def each_alone(q, k, v, bounds, bounds_again, longest, longest_again, *, window_size):
    """Do what a kernel for variable lengths does, sequence by sequence."""
    assert torch.equal(bounds, bounds_again) and longest == longest_again and window_size == (-1, 0)
    assert bounds.dtype == torch.int32 and bounds.diff().max() == longest
    parts = []
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:]):
        one = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
        parts.append(reference(*one, Mask(stop - start, stop - start))[0].transpose(0, 1))
    return torch.cat(parts)


@given(problems(), st.integers(0, 2**31))
def test_documents_one_by_one_are_the_same(problem, seed):
    inputs, mask = problem
    if mask.runs() is None:
        assert mask.queries is None or mask.offset or not mask.causal
        return
    expected = outputs(reference, inputs, mask, seed)
    got = outputs(lambda q, k, v, m: by_documents(q, k, v, m, each_alone), inputs, mask, seed)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() <= 1e-12 * max(1, other.abs().max().item())


def test_a_document_in_two_pieces_is_no_run():
    rows = torch.tensor([[0, 1, 1], [2, 0, 2]])
    assert Mask(3, 3, queries=rows, keys=rows).runs() is None
    runs = Mask(3, 3, queries=rows[:1], keys=rows[:1]).runs()
    assert runs is not None and runs.bounds.tolist() == [0, 1, 3] and runs.longest == 2


@given(problems())
@settings(max_examples=20)
def test_reference_is_the_formula_element_by_element(problem):
    (q, k, v), mask = problem
    out = reference(q, k, v, mask)
    shares = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = [
                    s
                    for s in range(k.shape[2])
                    if (not mask.causal or s <= mask.offset + t)
                    and (mask.keys is None or mask.keys[b, s] == mask.queries[b, t])
                ]
                scores = torch.stack([q[b, h, t] @ k[b, h // shares, s] for s in seen]) / q.shape[-1] ** 0.5
                expected = scores.softmax(0) @ v[b, h // shares, seen]
                assert torch.allclose(out[b, h, t], expected, rtol=0, atol=1e-12)


@given(problems(), st.integers(1, 6))
@settings(max_examples=10)
def test_tiled_backward_passes_gradcheck(problem, tile):
    inputs, mask = problem
    assert torch.autograd.gradcheck(lambda q, k, v: tiled(q, k, v, mask, tile=tile), inputs, fast_mode=True)


def saved_bytes(attention, num_tokens: int) -> int:
    """Count what backward keeps of one call, beyond the inputs themselves."""
    inputs = [torch.randn(1, 2, num_tokens, 8, requires_grad=True) for _ in range(3)]
    known = {x.data_ptr() for x in inputs}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in known:
            kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(*inputs, Mask(num_tokens, num_tokens)).sum()
    return sum(kept.values())


def test_tiled_keeps_memory_linear_in_tokens_and_reference_does_not():
    heads, dim, size = 2, 8, 4
    for num_tokens in (64, 128, 256):
        output_and_log_sum = heads * num_tokens * (dim + 1) * size
        assert saved_bytes(tiled, num_tokens) == output_and_log_sum
        assert saved_bytes(reference, num_tokens) >= heads * num_tokens**2 * size


def test_tiled_never_makes_a_tensor_with_more_scores_than_a_tile(monkeypatch):
    largest = 0
    plain = torch.Tensor.__matmul__

    def watched(left: Tensor, right: Tensor) -> Tensor:
        nonlocal largest
        out = plain(left, right)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    q, k, v = (torch.randn(1, 1, 200, 4, requires_grad=True) for _ in range(3))
    tiled(q, k, v, Mask(200, 200), tile=16).sum().backward()
    assert 0 < largest <= 16 * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_dtype_stays_near_float64(dtype, name):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 2, 33, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    exact = reference(q, k, v, Mask(33, 33))
    out = implementation(name)(q.to(dtype), k.to(dtype), v.to(dtype), Mask(33, 33))
    assert out.dtype == dtype
    assert (out.to(torch.float64) - exact).abs().max() < 20 * torch.finfo(dtype).eps


def test_unknown_attention_is_named_with_the_nearest():
    with pytest.raises(UserError, match="'tield'.*try: tiled"):
        implementation("tield")
    with pytest.raises(UserError, match="at least 1 token, got 0"):
        tiled(*(torch.ones(1, 1, 2, 2) for _ in range(3)), Mask(2, 2), tile=0)
