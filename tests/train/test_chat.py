"""Training on conversations: prompts can be masked, in pretraining and in adaptation."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.data.loader import DataConfig, Loader, SourceConfig
from mmpt.data.tokens import EncodedDocument
from mmpt.decode.dida import corrupt
from mmpt.stream import Segment
from mmpt.train.adapt import adapt
from mmpt.train.pretrain import train
from mmpt.train.recipe import AdaptRecipe, RunRecipe
from mmpt.vocab import Modality


def talk(number: int) -> EncodedDocument:
    """The user shows a picture of codes below 32 and asks, the assistant says and shows others."""
    rng, key = np.random.default_rng(number), f"talk-{number}"
    said = [
        Segment(Modality.IMAGE, rng.integers(0, 32, (3, 3))),
        Segment(Modality.TEXT, rng.integers(0, 100, 5)),
        Segment(Modality.TEXT, rng.integers(100, 200, 4)),
        Segment(Modality.IMAGE, rng.integers(32, 64, (3, 3))),
    ]
    return EncodedDocument(key, key, "fixed", said, ("user", "user", "assistant", "assistant"))


@pytest.fixture
def chat(tmp_path, write_shard) -> DataConfig:
    """Rows of conversations whose prompts are masked."""
    write_shard(tmp_path / "talk.tokens.tar", [talk(n) for n in range(40)])
    source = SourceConfig(shards=(str(tmp_path / "talk.tokens.tar"),))
    return DataConfig(sources={"talk": source}, rows=2, length=128, buffer=8, prompts="masked")


def test_only_what_the_assistant_says_has_weight(chat, vocabulary):
    rows = next(Loader(replace(chat, condition_drop=0.0), vocabulary, seed=0))
    visual = vocabulary.range_of(Modality.IMAGE).start
    asked = (rows.ids < 100) | ((rows.ids >= visual) & (rows.ids < visual + 32))
    answer = ((rows.ids >= 100) & (rows.ids < 200)) | (
        (rows.ids >= visual + 32) & (rows.ids < visual + 64)
    )
    assert asked.any()
    assert not rows.loss_weight[asked].any()
    assert (rows.loss_weight[answer] == 1).all()
    for name, weight in (("<user>", 0), ("<assistant>", 0), ("<eod>", 1)):
        assert (rows.loss_weight[rows.ids == vocabulary.structure_id(name)] == weight).all()


def test_a_trained_model_learns_to_answer_and_the_run_stays_masked(
    tmp_path, chat, another, vocabulary
):
    first = train(another(steps=2), tmp_path / "first", vocabulary=vocabulary, progress=False)
    chat = replace(chat, condition_drop=0.0)
    recipe = another(data=chat, start=str(first.checkpoint), steps=6, checkpoint_every=3)
    whole = train(recipe, tmp_path / "whole", vocabulary=vocabulary, progress=False)
    read = whole.last["share"]["image"] * whole.last["step_tokens"]
    assert 2 * whole.last["modality"]["image"]["tokens"] == pytest.approx(read, abs=1)
    with pytest.raises(UserError, match=r"data.prompts = masked, now it is learned"):
        train(
            replace(recipe, data=replace(chat, prompts="learned")),
            tmp_path / "whole",
            vocabulary=vocabulary,
            progress=False,
        )


def test_what_the_user_shows_is_not_denoised(tmp_path, chat, another, vocabulary):
    loader = Loader(chat, vocabulary, seed=0)
    rows = next(loader)
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    joint = corrupt(rows, vocabulary, generators=generators, max_noisy=100)
    labels = joint.labels[joint.labels >= 0] - vocabulary.range_of(Modality.IMAGE).start
    assert len(labels)
    assert (labels >= 32).all()
    train(another(steps=1), tmp_path / "first", vocabulary=vocabulary, progress=False)
    common = {f.name: getattr(another(data=chat, steps=2), f.name) for f in fields(RunRecipe)}
    recipe = AdaptRecipe(**common, start=str(tmp_path / "first"), max_noisy=40)
    result = adapt(recipe, tmp_path / "adapted", vocabulary=vocabulary, progress=False)
    assert result.counters.bad_steps == 0


def test_a_state_of_before_prompts_could_be_masked_is_read(chat, vocabulary):
    learned = Loader(replace(chat, prompts="learned"), vocabulary, seed=0)
    next(learned)
    state = learned.state_dict()
    del state["settings"]["prompts"]
    again = Loader(learned.config, vocabulary, seed=0)
    again.load_state_dict(state)
    assert torch.equal(next(again).ids, next(learned).ids)
    with pytest.raises(UserError, match="has prompts = learned, this recipe masked"):
        Loader(chat, vocabulary, seed=0).load_state_dict(state)
