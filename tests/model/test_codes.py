"""Embeddings of codes from their codec's latents: like begins alike, other ids keep their rows."""

import pytest
import torch

from mmpt.config import UserError
from mmpt.model.codes import initialise_codes
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.tokenizers.quantize import FSQ
from mmpt.vocab import CodeRange, Vocabulary


@pytest.fixture
def model() -> Decoder:
    config = ModelConfig(
        vocab_size=700, width=48, num_layers=1, num_heads=2, num_kv_heads=1, expert_hidden=16
    )
    return Decoder.from_config(config)


def test_codes_that_decode_alike_begin_alike(model: Decoder) -> None:
    fsq = FSQ((8, 8, 8))
    before = model.embedding.clone()
    latents = fsq.lookup(torch.arange(512)[:, None])
    initialise_codes(model, CodeRange("visual", 100, 512, {}), latents, torch.Generator())
    after = model.embedding
    assert torch.equal(after[:100], before[:100])
    assert torch.equal(after[612:], before[612:])
    scale = float(before[100:612].std())
    assert float(after[100:612].std()) == pytest.approx(scale, rel=0.1)
    unit = torch.nn.functional.normalize(after[100:612] - after[100:612].mean(0), dim=-1)
    alike = unit @ unit.T
    distance = torch.cdist(latents, latents)
    near, far = (distance > 0) & (distance < 0.3), distance > 1.5
    assert alike[near].mean() > alike[far].mean() + 0.3


def test_latents_of_other_codecs_are_refused(vocabulary: Vocabulary, tmp_path, image_codec) -> None:
    from mmpt.data.loader import DataConfig, SourceConfig
    from mmpt.train.pretrain import pretrainer
    from mmpt.train.recipe import TrainRecipe, fit_model

    image_codec.save(tmp_path / "image")
    small = ModelConfig(
        vocab_size=1, width=16, num_layers=1, num_heads=2, num_kv_heads=1, expert_hidden=16
    )
    recipe = TrainRecipe(
        data=DataConfig(sources={"a": SourceConfig(shards=("none",))}),
        steps=1,
        model=fit_model(small, vocabulary),
        codes_from=(str(tmp_path / "image"),),
    )
    with pytest.raises(UserError, match="codes_from"):
        pretrainer(recipe, tmp_path / "run", vocabulary=vocabulary)
