import pytest
import torch

from mmpt.model import backends
from mmpt.model.backends import Causal, Masked, plan_pieces
from mmpt.model.layout import Layout, visible
from mmpt.model.rotary import Rotary


@pytest.fixture
def layout():
    """Two documents, a noisy block of each, and pads: clean 0-7, noisy 8-13."""
    document = [0, 0, 0, 0, 1, 1, 1, -1, 0, 0, 0, 1, 1, -1]
    position = [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 1, 0]
    block = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 1, 1, -1]
    limit = [0, 1, 2, 3, 0, 1, 2, 0, 1, 1, 1, 0, 0, 0]
    return Layout(*(torch.tensor([column]) for column in (document, position, block, limit)))


def _sees(layout: Layout, q: int, k: int) -> bool:
    # in words: pads see themselves, noisy keys are seen by their block, clean ones up to the limit
    d, p, b, m = (
        getattr(layout, n)[0].tolist() for n in ("document", "position", "block", "limit")
    )
    if q == k:
        return True
    if d[q] != d[k] or d[q] < 0:
        return False
    if b[k] >= 0:
        return b[q] == b[k]
    return p[k] <= m[q]


def test_the_mask_is_the_rule_applied_to_every_pair(layout):
    seen = visible(layout, layout)[0]
    expected = [[_sees(layout, q, k) for k in range(14)] for q in range(14)]
    assert seen.tolist() == expected


def test_clean_ids_see_no_noisy_id_and_a_block_not_its_own_clean_copy(layout):
    seen = visible(layout, layout)[0]
    assert not seen[:8, 8:].any()
    assert seen[9, :8].tolist() == [True, True] + [False] * 6  # the slot copies position 1


def test_pieces_equal_dense_attention(layout, monkeypatch):
    monkeypatch.setattr(backends, "CHUNK", 3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, 14, 4, generator=generator, dtype=torch.float64) for h in (4, 2, 2)
    )
    pieces = plan_pieces(layout, layout)
    assert len(pieces) == 5
    assert any(isinstance(piece.keys, torch.Tensor) for piece in pieces)  # a gap between the keys
    k4, v4 = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (q @ k4.transpose(-1, -2) / 2).masked_fill(~visible(layout, layout)[:, None], -1e300)
    torch.testing.assert_close(Masked(pieces)(q, k, v), scores.softmax(-1) @ v4, atol=1e-12, rtol=0)


def test_without_pieces_attention_is_causal():
    x = torch.randn(1, 2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layout = Layout.clean(torch.zeros(1, 9, dtype=torch.int64), torch.arange(9)[None])
    whole = Causal()(x, x, x)
    torch.testing.assert_close(whole, Masked(plan_pieces(layout, layout))(x, x, x))


def test_rotary_scores_depend_on_the_distance_only(make_config):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def score(at_q: int, at_k: int) -> torch.Tensor:
        turned = [
            Rotary.at(torch.tensor([[at]]), make_config(), x.dtype).turn(x)
            for at, x in ((at_q, q), (at_k, k))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(1005, 1000))
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3
