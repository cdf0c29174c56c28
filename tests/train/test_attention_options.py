"""Options of attention in training: what moves, and what is refused."""

from contextlib import closing
from dataclasses import fields, replace

import pytest
import torch

from mmpt.config import UserError
from mmpt.model.rotary import axes_of
from mmpt.model.transformer import Decoder
from mmpt.train.adapt import adapt
from mmpt.train.checkpoint import find_model
from mmpt.train.loss import NextToken
from mmpt.train.pretrain import pretrainer, train
from mmpt.train.recipe import AdaptRecipe, RunRecipe

OPTIONS = {"rope": "3d", "head_width": 12, "untied_attention": True, "gated_attention": True}


@pytest.fixture
def optioned(recipe):
    """Two steps by Muon of a model with all options that ranks cannot divide."""
    optim = replace(recipe.optim, kind="muon")
    return replace(recipe, steps=2, optim=optim, model=replace(recipe.model, **OPTIONS))


def test_every_option_trains_and_is_adapted(tmp_path, optioned, vocabulary):
    result = train(optioned, tmp_path / "trained", vocabulary=vocabulary, progress=False)
    assert result.finished
    model = Decoder.load(find_model(tmp_path / "trained"))
    first = Decoder.from_config(model.config, seed=optioned.seed)
    for name, parameter in first.named_parameters():
        if "attention." in name:
            assert not torch.equal(parameter, model.get_parameter(name)), name
    common = {f.name: getattr(optioned, f.name) for f in fields(RunRecipe)}
    start = AdaptRecipe(**common, start=str(tmp_path / "trained"), max_noisy=40)
    assert adapt(start, tmp_path / "adapted", vocabulary=vocabulary, progress=False).finished


def test_the_loss_is_of_positions_on_three_axes(tmp_path, optioned, vocabulary):
    with closing(pretrainer(optioned, tmp_path, vocabulary=vocabulary)) as trainer:
        rows, model = next(iter(trainer.loader)), trainer.model.eval()
        generators = [torch.Generator() for _ in rows.ids]
        objective = NextToken()
        batch = objective.prepare(rows, generators)
        seen = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["axes"]), with_kwargs=True
        )
        objective.losses(model, batch)
        model.config = replace(model.config, rope="1d")
        objective.losses(model, batch)
        assert torch.equal(seen[0], axes_of(rows))
        assert seen[1] is None


def test_a_backend_that_is_absent_is_refused_before_data_is_read(tmp_path, recipe, vocabulary):
    source = replace(recipe.data.sources["a"], shards=("nowhere.tar",))
    wrong = replace(
        recipe, data=replace(recipe.data, sources={"a": source}), attention="flex", device="cpu"
    )
    with pytest.raises(UserError, match="attention = flex needs CUDA"):
        train(wrong, tmp_path / "run", vocabulary=vocabulary, progress=False)
