import json
from dataclasses import replace

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.data.loader import DataConfig, SourceConfig
from mmpt.data.shards import Document
from mmpt.data.shards import write_shard as write_raw
from mmpt.data.tokens import EncodedDocument
from mmpt.model.transformer import Decoder
from mmpt.parts import Audio, Image, Text, load_part
from mmpt.stream import Segment
from mmpt.train.adapt import adapt
from mmpt.train.pretrain import train
from mmpt.train.recipe import AdaptRecipe, fit_model
from mmpt.train.samples import Samples, SamplesConfig
from mmpt.vocab import Modality


@pytest.fixture
def shown(tmp_path, processor, write_shard, another, recipe):
    """A recipe on data of real codecs, and the settings of samples."""
    rng = np.random.default_rng(0)
    encoded = tmp_path / "encoded"
    documents = [
        EncodedDocument(f"{n}", f"{n}", "fixed", [Segment(Modality.TEXT, rng.integers(0, 256, 40))])
        for n in range(30)
    ]
    processor.vocabulary.save(encoded / "vocabulary.json")
    processor.save_settings(encoded)
    shard = write_shard(encoded / "a.tokens.tar", documents, vocabulary=processor.vocabulary)
    picture = Image(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    sound = Audio(np.zeros(16000, dtype=np.float32), 16000)
    raw = [
        Document(f"{n}", f"{n}", "any", [Text(f"number {n}"), part])
        for n, part in enumerate([picture, sound, picture, picture])
    ]
    write_raw(tmp_path / "heldout.tar", raw)
    return another(
        vocabulary=str(encoded / "vocabulary.json"),
        data=DataConfig(sources={"a": SourceConfig(shards=(str(shard),))}, rows=2, length=64),
        model=fit_model(recipe.model, processor.vocabulary),
        steps=3,
    ), SamplesConfig(
        every=2,
        shards=(str(tmp_path / "held*.tar"),),
        text=1,
        image=1,
        speech=1,
        max_seconds=0.3,
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "samples" / "index.jsonl").open()]


def kept(folder, names=("loss", "load", "router", "grad_norm")):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{name: line[name] for name in names} for line in lines]


def test_samples_change_nothing_of_a_run(tmp_path, shown, processor, tensors_equal, caplog):
    recipe, settings = shown
    plain, sampled = (
        train(each, tmp_path / name, vocabulary=processor.vocabulary, progress=False)
        for name, each in (("plain", recipe), ("sampled", replace(recipe, samples=settings)))
    )
    assert "training goes on" not in caplog.text
    weights = [Decoder.load(each.checkpoint).state_dict() for each in (plain, sampled)]
    assert tensors_equal(*weights)
    assert kept(tmp_path / "plain") == kept(tmp_path / "sampled")
    made = rows(tmp_path / "sampled")
    assert [row["file"] for row in made] == [
        f"step-00000002/{name}" for name in ("text-0-ar.txt", "image-0-ar.png", "speech-0-ar.wav")
    ]
    assert [row["prompt"] for row in made] == ["prompts/text-0.png", "number 0", "number 1"]
    for row in made:
        load_part(tmp_path / "sampled" / "samples" / row["file"])
        assert row["vocabulary"] == processor.vocabulary.fingerprint


def test_an_adapted_model_answers_by_both_decoders(tmp_path, shown, processor):
    recipe, settings = shown
    start = train(recipe, tmp_path / "start", vocabulary=processor.vocabulary, progress=False)
    pictures = SamplesConfig(every=1, shards=settings.shards, text=0, image=1, speech=0)
    adapted = AdaptRecipe(
        data=recipe.data,
        vocabulary=recipe.vocabulary,
        steps=1,
        start=str(start.checkpoint),
        samples=pictures,
    )
    adapt(adapted, tmp_path / "run", vocabulary=processor.vocabulary, progress=False)
    assert [row["file"] for row in rows(tmp_path / "run")] == [
        *("step-00000001/image-0-ar.png", "step-00000001/image-0-dida.png")
    ]


def test_samples_that_cannot_be_saved_stop_nothing(tmp_path, shown, processor, model, caplog):
    recipe, settings = shown
    made = Samples(
        settings,
        tmp_path,
        vocabulary=processor.vocabulary,
        settings=processor.settings,
        step=0,
    )
    (tmp_path / "samples").write_text("in the way")
    small = Decoder.from_config(recipe.model).train()
    made.make(small, 2)
    assert "no samples of step 2" in caplog.text
    assert small.training


def test_what_is_missing_is_said_before_training(tmp_path, shown, processor):
    options = {"vocabulary": processor.vocabulary, "step": 0}
    with pytest.raises(UserError, match=r"samples\.shards is empty"):
        SamplesConfig(every=2)
    nothing = SamplesConfig(every=2, shards=(str(tmp_path / "none-*.tar"),))
    with pytest.raises(UserError, match="no such file"):
        Samples(nothing, tmp_path, settings=processor.settings, **options)
    with pytest.raises(UserError, match=r"no processor\.json"):
        Samples(shown[1], tmp_path, settings=None, **options)
