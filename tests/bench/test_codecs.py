"""`mmpt bench codecs`: every quantiser has a peer that agrees with it; a wrong one is noticed."""

import pytest
import torch

from mmpt.bench import codecs, harness

pytest.importorskip("vector_quantize_pytorch")


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "BUDGET", 0.0)
    monkeypatch.setattr(harness, "REPETITIONS", 1)
    monkeypatch.setattr(harness, "PARTS", 1)
    monkeypatch.setattr(codecs, "BATCH", 2)
    monkeypatch.setattr(codecs, "NUM_VECTORS", 64)


def test_every_kind_that_the_peer_has_is_compared() -> None:
    cases = list(codecs._quantizers())
    assert {config.kind for _, config, _ in cases} == {"fsq", "ema", "simvq", "lfq", "bsq"}
    with torch.inference_mode():
        rows = [codecs._quantizer_row(c, config, p.eval(), "cpu") for c, config, p in cases]
    assert all(row.ours > 0 and row.peer_name == codecs.PEER for row in rows)


def test_a_quantiser_that_gives_other_latents_is_not_timed() -> None:
    latents = torch.randn(100, 4)
    codecs._show_equal("itself", latents, latents.clone())
    with pytest.raises(RuntimeError, match="100 of 100 vectors differ"):
        codecs._show_equal("another", latents, latents + 1)


def test_the_search_is_compared_with_two_others() -> None:
    with torch.inference_mode():
        rows = list(codecs._search_rows("cpu"))
    assert [row.peer_name for row in rows] == [codecs.PEER, "torch, one matrix product"]
