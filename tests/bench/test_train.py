"""`mmpt bench train`: the peer computes the same where it should, and a wrong one is noticed."""

from contextlib import closing
from pathlib import Path

import pytest
import torch

from mmpt.bench import data, harness, olmoe, train
from mmpt.bench.train import loss_of, loss_of_peer
from mmpt.model.layer import Layer
from mmpt.train.loop import Trainer

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "BUDGET", 0.0)
    for module in (harness, train):
        monkeypatch.setattr(module, "REPETITIONS", 1)
        monkeypatch.setattr(module, "PARTS", 1)
    sizes = {"width": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "expert_hidden": 16}
    monkeypatch.setattr(train, "OLMOE", olmoe.shape(experts=4, active=2, **sizes))
    monkeypatch.setattr(train, "ROWS", 2)
    monkeypatch.setattr(train, "LENGTH", 32)
    monkeypatch.setattr(train, "VOCABULARY", 1200)
    monkeypatch.setattr(train, "BLOCK", 1)
    monkeypatch.setattr(train, "SIDE", {"cpu": 64})
    monkeypatch.setattr(olmoe, "SETTINGS", olmoe.SETTINGS[:1])
    monkeypatch.setattr(data, "DOCUMENTS", 80)
    small = ("model.width=48", "model.num_layers=1", "data.rows=1", "data.length=128")
    monkeypatch.setattr(train, "TINY", [*train.TINY, *small])


def plain_trainer(folder: Path) -> Trainer:
    sizes = train.OLMOE, train.ROWS, train.LENGTH
    return train.plain_trainer(folder / "run", "cpu", "fp32", *sizes)


def test_losses_and_gradients_are_those_of_the_peer(tmp_path: Path) -> None:
    train.show_equal(tmp_path / "run", "cpu")  # which raises where they are not


def test_a_peer_with_another_weight_is_not_timed(tmp_path: Path) -> None:
    with closing(plain_trainer(tmp_path)) as trainer:
        rows = train.next_rows(trainer, 1)[0]
        assert train.show_close(trainer, rows) < train.CLOSE
        peer = olmoe.olmoe(trainer.model)
        layer = trainer.model.layers[0]
        assert isinstance(layer, Layer)
        torch.nn.init.constant_(layer.experts.experts()[0].bank.down, 1.0)
        with pytest.raises(RuntimeError, match="the loss differs"):
            train._show_near("loss", loss_of(trainer, rows), loss_of_peer(peer, rows))


@pytest.mark.parametrize("precision", train.PRECISIONS)
def test_a_step_is_compared_with_that_of_the_peer_and_with_the_peak(
    tmp_path: Path, precision: str
) -> None:
    ours, peak = train._olmoe_rows(tmp_path, "cpu", precision)
    assert ours.peer_name == "transformers OLMoE, grouped_mm experts, sdpa attention"
    assert ours.dtype == peak.dtype == precision
    assert 0 < peak.ratio < 1
    assert peak.ratio == pytest.approx(peak.ours / peak.peer)


def test_flops_are_three_passes_over_what_is_seen(tmp_path: Path) -> None:
    with closing(plain_trainer(tmp_path)) as trainer:
        batches = train.next_rows(trainer, 2)
        flops, ids = train.flops_of_step(trainer.model, batches)
        assert ids == train.ROWS * train.LENGTH
        config, weights = trainer.model.config, trainer.model.num_parameters
        spared = config.num_layers * 2 * 3 * config.width * config.expert_hidden  # 2 of 4 experts
        spared += config.vocab_size * config.width  # looked up, not multiplied
        scales = config.num_layers * 2 * config.width_per_head  # of QK-norms
        seen = config.num_layers * 4 * config.width * (train.LENGTH / 2)
        assert flops == pytest.approx(ids * 3 * (2 * (weights - spared - scales) + seen), rel=0.01)


def test_watching_and_checkpoints_are_parts_of_a_step(tmp_path: Path) -> None:
    with closing(train.tiny_trainer(tmp_path / "tiny", "cpu")) as trainer:
        watching = train._watching_row(trainer)
        assert (tmp_path / "tiny" / "run" / "metrics.jsonl").stat().st_size
        blocking, every = train._checkpoint_rows(trainer)
        assert trainer.saved.failed == 0
    assert watching.ratio == pytest.approx(watching.peer / watching.ours)
    assert blocking.ours > 0
    assert (blocking.peer, every.peer) == (train.MAX_BLOCKING, train.MAX_CHECKPOINTS)
