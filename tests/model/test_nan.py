"""A hidden state that is not a number stays in its row."""

import pytest
import torch

from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder

SMALL = ModelConfig(
    vocab_size=40, width=16, num_layers=2, num_heads=2, num_kv_heads=1, expert_hidden=24
)


@pytest.mark.parametrize("training", [True, False])
def test_other_rows_are_as_they_were(training):
    model = Decoder.from_config(SMALL).train(training)
    ids = torch.arange(24).view(3, 8) % 20
    options = {"modality": ids % 4, "document": torch.zeros_like(ids), "position": ids % 8}
    right = model(ids, **options)
    with torch.no_grad():
        model.embedding[30] = torch.nan
    ids[1, 2] = 30
    wrong = model(ids, **options)
    torch.testing.assert_close(wrong[[0, 2]], right[[0, 2]])
    assert wrong[1, 2].isnan().all()


@torch.no_grad()
def test_other_rows_of_a_cache_are_as_they_were():
    model = Decoder.from_config(SMALL).eval()
    ids = torch.arange(16).view(2, 8)
    right = model(ids, modality=ids % 4)
    model.embedding[30] = torch.nan
    ids[1, 2] = 30
    cache = model.new_cache()
    parts = [model(part, modality=part % 4, cache=cache) for part in ids.split((4, 3, 1), dim=1)]
    wrong = torch.cat(parts, dim=1)
    torch.testing.assert_close(wrong[0], right[0])
    assert wrong[1, 2].isnan().all()
