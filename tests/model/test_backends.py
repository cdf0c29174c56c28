"""Every way to compute attention follows one rule, and documents never see each other."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.model import backends
from mmpt.model.backends import Diagonal, Flex, Masked, check_backend, plan_attention, plan_pieces
from mmpt.model.layout import Layout, segments, visible

NUM = 24  # ids of a row
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def _row(documents: list[int], blocks: list[tuple[int, int, int]]) -> list[tuple[int, ...]]:
    # (document, position, block, limit): clean documents, noisy copies of parts of them, pads
    ids = [(d, p, -1, p) for d, size in enumerate(documents) for p in range(size)]
    for number, (document, start, size) in enumerate(blocks):
        document %= len(documents)
        start %= documents[document]
        ids += [(document, start + p, number, start) for p in range(size)]
    return (ids + [(-1, 0, -1, 0)] * NUM)[:NUM]


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=5)
copies = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 8), st.integers(1, 5)), max_size=3)
rows = st.builds(_row, sizes, copies)
clean_rows = st.builds(_row, sizes, st.just([]))


def _layout(*rows: list[tuple[int, ...]]) -> Layout:
    return Layout(*torch.tensor(rows).unbind(-1))


def _qkv(batch: int, num: int = NUM) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, h, num, 4, generator=generator).double() for h in (4, 2, 2)]


@settings(max_examples=40, deadline=None)
@given(rows, rows, st.integers(1, 30))
def test_documents_never_see_each_other(one, other, chunk):
    layout = _layout(one, other)
    document = layout.document
    q, k, v = _qkv(2)
    before, backends.CHUNK = backends.CHUNK, chunk
    try:
        attend = Masked(plan_pieces(layout, layout))
    finally:
        backends.CHUNK = before
    out = attend(q, k, v)
    changed = (document == 1)[:, None, :, None]
    moved = attend(q, torch.where(changed, k + 1, k), torch.where(changed, v - 1, v)) != out
    moved = moved.any(1).any(-1)
    assert not moved[document != 1].any()
    assert moved[document == 1].all()  # each sees itself
    seen = visible(layout, layout)
    clean, noisy = (layout.block < 0)[:, :, None], (layout.block >= 0)[:, None]
    assert not (seen & clean & noisy).any()


@settings(max_examples=40, deadline=None)
@given(clean_rows, clean_rows)
def test_packed_documents_are_blocks_along_the_diagonal(one, other):
    layout = _layout(one, other)
    found = segments(layout)
    assert found is not None
    blocks = torch.block_diag(*(torch.ones(size, size).tril() for size in found)) > 0
    assert torch.equal(torch.block_diag(*visible(layout, layout)) > 0, blocks)


def test_other_layouts_have_no_blocks_along_the_diagonal():
    assert segments(_layout(_row([5, 6], [(0, 2, 3)]))) is None
    parts = _layout(_row([5, 6, 4], []))
    parts.document[parts.document == 2] = 0  # the first document goes on behind the second
    assert segments(parts) is None
    q, k, v = _qkv(1)
    other = plan_attention(parts, parts, "xformers")  # which has no mask for it
    assert torch.equal(other(q, k, v), plan_attention(parts, parts)(q, k, v))


@settings(max_examples=8, deadline=None)
@given(rows, rows)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_the_dense_mask(one, other):
    layout = _layout(one, other)
    q, k, v = _qkv(2)
    expected = plan_attention(layout, layout)(q, k, v)
    torch.testing.assert_close(plan_attention(layout, layout, "flex")(q, k, v), expected)
    last = Layout(*(getattr(layout, n)[:, -9:] for n in ("document", "position", "block", "limit")))
    some = Flex.plan(last, layout)(q[:, :, -9:], k, v)  # as behind a cache
    torch.testing.assert_close(some, expected[:, :, -9:])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_model_computes_the_same_by_another_backend_while_it_trains(make_model, make_rows, run):
    model, rows = make_model().train(), make_rows()
    with torch.no_grad():
        expected = run(model, rows)
        model.backend = "flex"
        torch.testing.assert_close(run(model, rows), expected)


def test_what_is_absent_is_refused_in_one_line(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    check_backend("sdpa", cpu)
    for name in ("flex", "xformers"):
        with pytest.raises(UserError, match=f"attention = {name} needs CUDA, .* use sdpa"):
            check_backend(name, cpu)
    check_backend("flex", gpu)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mmpt\[gpu\]'"):
        check_backend("xformers", gpu)


@on_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flex", "xformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_give_equal_results_and_gradients_on_cuda(backend, dtype):
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        pytest.skip("needs xformers")
    layout = _layout(_row([5, 9, 3], []), _row([9, 2, 8], []))
    layout = Layout(
        *(getattr(layout, n).cuda() for n in ("document", "position", "block", "limit"))
    )
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(2, h, NUM, 32, generator=generator).to("cuda", dtype).requires_grad_()
        for h in (4, 2, 2)
    ]
    results = []
    for name in ("sdpa", backend):
        attend = plan_attention(layout, layout, name)
        assert isinstance(attend, {"sdpa": Masked, "flex": Flex, "xformers": Diagonal}[name])
        out = attend(*parts)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), parts)])
    near = 2e-2 if dtype == torch.bfloat16 else 1e-3
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=near, rtol=near)
