import itertools

import pytest

from mmpt.config import UserError
from mmpt.train.optim import OptimConfig, build_optimizer, decays, learning_rate


def rates(**options):
    config = OptimConfig(lr=1.0, warmup=10, **options)
    return [learning_rate(step, 100, config) for step in range(100)]


def test_wsd_rises_stays_and_falls():
    found = rates(schedule="wsd", decay=0.2, final=0.1)
    assert found[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert set(found[9:81]) == {1.0}
    assert found[90] == pytest.approx(0.55)
    assert found[99] == pytest.approx(0.1 + 0.9 / 20)
    assert all(later < earlier for earlier, later in itertools.pairwise(found[80:]))


def test_cosine_ends_at_the_final_rate():
    found = rates(schedule="cosine", final=0.1)
    assert found[10] == 1.0
    assert found[55] == pytest.approx(0.55)
    assert found[99] == pytest.approx(0.1, abs=0.001)


def test_constant_stays():
    assert set(rates(schedule="constant")[9:]) == {1.0}


def test_norms_embeddings_and_vectors_do_not_decay(model):
    decayed = {name for name, p in model.named_parameters() if decays(name, p)}
    assert "layers.0.attention.project_in" in decayed
    assert "layers.0.experts.groups.text.bank.gate_up" in decayed
    assert "embedding" not in decayed
    assert not any("norm" in name for name in decayed)


def test_frozen_parameters_are_left_out(model):
    model.embedding.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.embedding) not in trained
    assert len(trained) == len(list(model.parameters())) - 1
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"decay": 1.5}, {"warmup": -1}])
def test_values_without_sense_are_refused(options):
    with pytest.raises(UserError):
        OptimConfig(**options)
