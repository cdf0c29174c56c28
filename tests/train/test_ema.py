import pytest
import torch

from mmpt.config import UserError
from mmpt.train.ema import Average


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def move(model, to):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(to)


def test_it_follows_the_weights_and_faster_at_first(model):
    move(model, 0.0)
    average = Average(model, 0.9)
    move(model, 1.0)
    average.update(0)
    assert average.state_dict()["embedding"][0, 0] == pytest.approx(0.9)  # decay 1 / 10
    move(model, 2.0)
    average.update(1000)
    assert average.state_dict()["embedding"][0, 0] == pytest.approx(0.9 * 0.9 + 0.1 * 2)


def test_the_model_has_the_average_inside_of_the_block_only(model, tensors_equal):
    average = Average(model, 0.9)
    first = values(model)
    move(model, 2.0)
    trained = values(model)

    def use_and_fail():
        with average.swapped():
            assert tensors_equal(values(model), first)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use_and_fail()
    assert tensors_equal(values(model), trained)
    assert tensors_equal(average.state_dict(), first)


def test_what_is_frozen_is_not_averaged(model):
    model.embedding.requires_grad_(False)
    assert "embedding" not in Average(model, 0.9).state_dict()


def test_a_saved_average_comes_back(model, tensors_equal):
    average = Average(model, 0.9)
    move(model, 2.0)
    average.update(5)
    other = Average(model, 0.9)
    other.load_state_dict(average.state_dict())
    assert tensors_equal(other.state_dict(), average.state_dict())
    with pytest.raises(KeyError):
        other.load_state_dict({})


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_without_sense_is_refused(another, decay):
    with pytest.raises(UserError, match="ema"):
        another(ema=decay)
