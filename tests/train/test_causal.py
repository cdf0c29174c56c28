"""MoMa's two trainings: experts that choose ids, then causal routers that learn what they took."""

from dataclasses import replace

import pytest
import torch

from mmpt.config import UserError
from mmpt.model.config import GroupConfig
from mmpt.model.transformer import Decoder
from mmpt.train.adapt import adapt
from mmpt.train.checkpoint import find_model
from mmpt.train.pretrain import train
from mmpt.train.recipe import AdaptRecipe, RunRecipe


@pytest.fixture
def moma(recipe):
    """Batch expert choice with noise, and auxiliary routers."""
    options = {"num_experts": 2, "router": "expert_choice", "causal": "auxiliary"}
    options |= {"router_noise": True, "router_z_loss": 0.01}
    groups = {
        "text": GroupConfig(modalities=("text",), **options),
        "media": GroupConfig(modalities=("image", "video", "speech"), **options),
    }
    return replace(recipe, model=replace(recipe.model, groups=groups), steps=4)


def test_routers_are_trained_after_the_model_and_alone(tmp_path, moma, vocabulary):
    first = train(moma, tmp_path / "model", vocabulary=vocabulary, progress=False)
    told = first.last["router"]["text"]
    assert all(norm > 0 for norm in told["grad_norm"])
    assert all(0 < share < 0.5 for share in told["unserved"])
    assert told["imbalance"] == [1.0, 1.0]
    after = replace(moma, objective="routers", start=str(tmp_path / "model"), steps=6)
    losses = []
    second = train(
        after,
        tmp_path / "routers",
        vocabulary=vocabulary,
        progress=False,
        on_step=lambda metrics: losses.append(metrics["loss"]),
    )
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # of a fair coin
    assert losses[-1] < losses[0]
    assert set(second.last["modality"]) <= {"text", "image", "video", "speech"}
    before, now = (
        Decoder.load(find_model(tmp_path / name)).state_dict() for name in ("model", "routers")
    )
    changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert changed == {name for name in now if ".auxiliary." in name}


def test_routers_without_a_model_are_refused(tmp_path, moma, vocabulary):
    with pytest.raises(UserError, match="name it by start"):
        train(replace(moma, objective="routers"), tmp_path / "run", vocabulary=vocabulary)


def test_noisy_ids_may_be_adapted_with_experts_that_choose_in_blocks(tmp_path, recipe, vocabulary):
    train(replace(recipe, steps=2), tmp_path / "model", vocabulary=vocabulary, progress=False)
    common = {name: getattr(recipe, name) for name in RunRecipe.__dataclass_fields__}
    adapting = AdaptRecipe(
        **common | {"steps": 2},
        start=str(tmp_path / "model"),
        max_noisy=40,
        router="expert_choice",
        capacity_slope=0.5,
    )
    result = adapt(adapting, tmp_path / "run", vocabulary=vocabulary, progress=False)
    assert result.counters.bad_steps == 0
    group = Decoder.load(result.checkpoint).config.groups["noisy_visual"]
    assert (group.router, group.scope, group.capacity_slope) == ("expert_choice", "block", 0.5)
    assert result.last["router"]["noisy_visual"]["imbalance"] == [1.0, 1.0]


def test_losses_of_routers_reach_their_weights_and_not_the_loss_that_is_told(
    tmp_path, recipe, vocabulary
):
    def go(name, **options):
        groups = {
            key: replace(group, **options) if group.num_experts > 1 else group
            for key, group in recipe.model.groups.items()
        }
        changed = replace(recipe, steps=1, model=replace(recipe.model, groups=groups))
        result = train(changed, tmp_path / name, vocabulary=vocabulary, progress=False)
        return result.last

    plain = go("plain")
    heavy = go("heavy", balance="loss", balance_loss=10.0, router_z_loss=10.0)
    assert heavy["loss"] == plain["loss"]
    norms = (row["router"]["text"]["grad_norm"] for row in (heavy, plain))
    assert all(more > 5 * less for more, less in zip(*norms, strict=True))
