"""`mmpt bench serve`: one row for each figure, after the ids were shown to be those of singles."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmpt.bench import bench, harness
from mmpt.bench import serve as module
from mmpt.config import UserError
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.pipeline import Pipeline, save_model
from mmpt.processor import Processor

SMALL = {"height": 16, "width": 16, "max_ids": 8, "max_seconds": 0.2, "num_passes": 2}


@pytest.fixture
def model(processor: Processor, tmp_path: Path) -> Path:
    config = ModelConfig(
        vocab_size=len(processor.vocabulary),
        width=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        expert_hidden=16,
        vocabulary=processor.vocabulary.fingerprint,
    )
    decoder = Decoder.from_config(config, seed=0)
    decoder.add_noisy_groups()
    save_model(decoder, processor, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "REPETITIONS", 1)
    monkeypatch.setattr(module, "REQUESTS", 4)
    monkeypatch.setattr(module, "CLIENTS", (1, 4))
    tasks = [replace(task, settings=task.settings | SMALL) for task in module.TASKS]
    monkeypatch.setattr(module, "TASKS", tasks)


def test_each_figure_is_a_row(model: Path) -> None:
    rows = bench("serve", model)["rows"]
    assert len(rows) == 4 * len(module.TASKS)
    assert [row["case"] for row in rows[:4]] == [
        "text, 1 client, first id",
        "text, 4 clients",
        "text, 4 clients, first id",
        "text, 4 clients, longest wait over median",
    ]
    for row in rows:
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["ours"] > 0


def test_other_ids_than_alone_are_not_timed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Pipeline.__call__

    def otherwise(self: Pipeline, *items: Any, seed: int = 0, **options: Any) -> Any:
        return call(self, *items, seed=seed + 1, **options)

    monkeypatch.setattr(Pipeline, "__call__", otherwise)
    with pytest.raises(RuntimeError, match="other ids than alone"):
        bench("serve", model)


def test_it_needs_a_model_and_others_take_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a model"):
        bench("serve")
    with pytest.raises(UserError, match="takes no model"):
        bench("codecs", tmp_path)
