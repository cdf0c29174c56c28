import signal
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.data.codes import with_used_codes
from mmpt.model.config import NoiseConfig
from mmpt.model.transformer import Decoder
from mmpt.processor import ProcessorSettings
from mmpt.train.adapt import Denoise, adapt, adapter, find_model, longest_block
from mmpt.train.loop import Trainer
from mmpt.train.pretrain import train
from mmpt.train.recipe import AdaptRecipe, RunRecipe
from mmpt.vocab import MEDIA, Modality, Vocabulary


@pytest.fixture
def trained(tmp_path, recipe, vocabulary):
    """The run folder of a pretrained model."""
    train(recipe, tmp_path / "trained", vocabulary=vocabulary, progress=False)
    return tmp_path / "trained"


@pytest.fixture
def adapt_recipe(recipe, trained):
    common = {f.name: getattr(recipe, f.name) for f in fields(RunRecipe)}
    return AdaptRecipe(**common, start=str(trained), max_noisy=40)


def plain(model, vocabulary):
    ids = torch.arange(40)[None] % 300
    with torch.no_grad():
        return model.eval()(ids, modality=torch.zeros_like(ids))


@pytest.mark.parametrize(
    "noise",
    [
        NoiseConfig(),
        NoiseConfig(path="metric"),
        NoiseConfig(path="masked", text_block=4),
    ],
    ids=["mixture", "metric", "masked-text"],
)
def test_adaptation_changes_nothing_that_clean_ids_meet(
    tmp_path, adapt_recipe, trained, vocabulary, noise
):
    recipe = replace(adapt_recipe, steps=4, copies=2, noise=noise)
    result = adapt(recipe, tmp_path / "adapted", vocabulary=vocabulary, progress=False)
    assert result.finished
    assert result.counters.bad_steps == 0
    before = Decoder.load(find_model(trained))
    after = Decoder.load(find_model(tmp_path / "adapted"))
    assert after.config.noise == replace(noise, max_block=26)  # a whole span of speech
    assert torch.equal(plain(before, vocabulary), plain(after, vocabulary))
    grown, ours = after.state_dict(), before.state_dict()
    assert all(torch.equal(grown[name], tensor) for name, tensor in ours.items())
    for group in ("visual", "text") if noise.text_block else ("visual",):
        new = [name for name in grown if f"noisy_{group}" in name and "down" in name]
        source = new[0].replace(f"noisy_{group}", group)
        assert not torch.equal(grown[new[0]], grown[source])


def test_a_resumed_adaptation_ends_bit_equal(tmp_path, adapt_recipe, vocabulary, tensors_equal):
    def stop(metrics):
        if metrics["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    def go(name, **options):
        folder = tmp_path / name
        result = adapt(recipe, folder, vocabulary=vocabulary, progress=False, **options)
        return result, Decoder.load(result.checkpoint).state_dict()

    noise = NoiseConfig(path="masked", text_block=4)
    recipe = replace(adapt_recipe, steps=6, copies=2, noise=noise)
    assert not go("stopped", on_step=stop)[0].finished
    assert tensors_equal(go("stopped")[1], go("whole")[1])


def test_denoising_reports_only_media(tmp_path, adapt_recipe, vocabulary):
    result = adapt(adapt_recipe, tmp_path / "adapted", vocabulary=vocabulary, progress=False)
    assert set(result.last["modality"]) <= {"image", "video", "speech"}
    assert result.counters.bad_steps == 0


def test_rows_without_media_are_no_bad_step(tmp_path, adapt_recipe, vocabulary):
    def build():
        model = Decoder.load(find_model(adapt_recipe.start))
        model.add_noisy_groups()
        model.freeze_for_adaptation()
        return model

    objective = Denoise(vocabulary, max_noisy=1)  # no block fits
    trainer = Trainer(
        adapt_recipe, tmp_path / "run", build=build, vocabulary=vocabulary, objective=objective
    )
    metrics = trainer.step()
    assert metrics["modality"] == {}
    assert metrics["bad_steps"] == 0


def test_all_noisy_ids_cost_compute_whether_they_are_hidden_or_not(
    adapt_recipe, vocabulary, tmp_path
):
    recipe = replace(adapt_recipe, noise=NoiseConfig(path="masked"))
    trainer = adapter(recipe, tmp_path / "run", vocabulary=vocabulary)
    [batch], _ = trainer._read()
    losses = trainer.objective.losses(trainer.model, batch)
    noisy = batch.joint.block >= 0
    expected = torch.bincount(batch.joint.modality[noisy], minlength=4).double()
    assert losses.num_noisy.tolist() == expected.tolist()
    assert losses.num_noisy.sum() > losses.counts.sum() > 0


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(UserError, match="no model at"):
        find_model(tmp_path)


def test_a_resumed_adaptation_keeps_its_used_codes_and_may_move_its_start(
    tmp_path, adapt_recipe, trained, vocabulary, tensors_equal
):
    def go(name, recipe, vocabulary, **options):
        folder = tmp_path / name
        result = adapt(recipe, folder, vocabulary=vocabulary, progress=False, **options)
        return Decoder.load(result.checkpoint).state_dict(), result.checkpoint

    def stop(metrics):
        if metrics["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    everything = {m: np.ones(512 if m == Modality.SPEECH else 64) for m in MEDIA}
    fewer = with_used_codes(
        vocabulary, {m: n * (np.arange(len(n)) > 2) for m, n in everything.items()}
    )
    go("stopped", adapt_recipe, vocabulary, on_step=stop)
    moved = replace(adapt_recipe, start=str(trained.rename(tmp_path / "moved")))
    resumed, checkpoint = go("stopped", moved, fewer)
    assert Vocabulary.load(checkpoint / "vocabulary.json") == vocabulary
    assert tensors_equal(resumed, go("whole", moved, vocabulary)[0])


def test_an_adapted_model_keeps_the_processor_of_its_start(tmp_path, adapt_recipe, vocabulary):
    settings = ProcessorSettings(("text-2k",), 32)
    settings.save(find_model(adapt_recipe.start))
    result = adapt(adapt_recipe, tmp_path / "adapted", vocabulary=vocabulary, progress=False)
    assert ProcessorSettings.load(result.checkpoint) == settings


def test_the_longest_block_is_of_those_that_fit(adapt_recipe, vocabulary):
    def longest(max_noisy, **noise):
        recipe = replace(adapt_recipe, max_noisy=max_noisy, noise=NoiseConfig(**noise))
        return longest_block(recipe, vocabulary)

    assert longest(40) == longest(27) == 26
    assert 16 <= longest(20) <= 19
    assert longest(30, text_block=28) == 28
    with pytest.raises(UserError, match=r"fits max_noisy = 1 .* the shortest has \d+"):
        longest(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copies": 0}, "copies = 0"),
        ({"noise": NoiseConfig(max_block=9)}, "leave it out"),
        ({"noise": NoiseConfig(text_block=512)}, "do not fit max_noisy"),
        ({"noise": NoiseConfig(path="metric"), "autoregressive": 0.5}, "would move"),
    ],
)
def test_mistakes_in_the_recipe_are_named(recipe, changes, message):
    common = {f.name: getattr(recipe, f.name) for f in fields(RunRecipe)}
    with pytest.raises(UserError, match=message):
        AdaptRecipe(**common, **changes)
