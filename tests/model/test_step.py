"""One id at a time over a cache: what the decoder gives, for any mix of groups and pads."""

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from mmpt.model import step as steps
from mmpt.model.step import GROUP_OPTIONS, Stepper, _Choice, _known

START = 4  # ids of a row that one pass commits


@pytest.mark.parametrize("small", [0, steps.SMALL])
def test_steps_equal_a_whole_pass(make_model, router, small, monkeypatch) -> None:
    """Rows of mixed media, of which one is padded on the left; experts one by one, or all."""
    monkeypatch.setattr(steps, "SMALL", small)
    model, generator = make_model(router), torch.Generator().manual_seed(3)
    ids, modality = (torch.randint(0, n, (4, 8), generator=generator) for n in (20, 4))
    modality[:, -1] = modality[0, -1]  # the last ids are of one group
    document = torch.zeros_like(ids)
    document[2, : START - 1] = -1
    position = ((document >= 0).cumsum(1) - 1).clamp(min=0)
    columns = {"modality": modality, "position": position, "document": document}
    with torch.inference_mode():
        expected = model(ids, **columns)
        cache, step = model.new_cache(), Stepper.of(model)
        model(ids[:, :START], **{n: c[:, :START] for n, c in columns.items()}, cache=cache)
        bias = torch.zeros(document.shape, dtype=torch.float64).masked_fill(
            document < 0, -torch.inf
        )
        for place in range(START, ids.shape[1]):
            seen = bias[:, None, None, : place + 1]
            media = modality[:, place].tolist()
            hidden = step(ids[:, place], media, position[:, place], cache, seen)
            torch.testing.assert_close(hidden, expected[:, place], rtol=0, atol=1e-10)


def test_all_experts_on_all_rows_are_the_chosen_ones(make_model, monkeypatch) -> None:
    model = make_model("shared", noisy=False)
    choice = Stepper(model)._layers[0].groups[0]
    assert isinstance(choice, _Choice)
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        chosen, gates = choice.route(x)
        every = torch.zeros(5, 3, dtype=x.dtype).scatter_(1, chosen, gates)
        monkeypatch.setattr(steps, "SMALL", 0)
        torch.testing.assert_close(x + choice.every(x, every), choice.add(x, x))


def test_packed_weights_give_the_same(make_model, monkeypatch) -> None:
    monkeypatch.setattr(steps, "SMALL", 0)
    monkeypatch.setattr(steps, "LARGE", 0)
    model, ids = make_model("shared", noisy=False).float(), torch.tensor([3, 5, 7])
    hidden = []
    for long in (0, 1):  # never, and from the first step on
        monkeypatch.setattr(steps, "LONG", long)
        with torch.inference_mode():
            cache, step = model.new_cache(), Stepper.of(model)
            for place in range(3):
                position = torch.full_like(ids, place)
                out = step(ids + place, [0, 0, 0], position, cache, None)
        hidden.append(out)
        packed = not isinstance(step._layers[0].project_in, partial)
        assert packed == (long and torch.backends.mkldnn.is_available())
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-4)


def test_a_model_with_an_option_that_steps_do_not_know_has_none(make_model) -> None:
    @dataclass
    class Config:
        router: str = "hard"
        shared: int = 0
        made: list[int] = field(default_factory=list)

    assert not _known(Config(), GROUP_OPTIONS)  # it cannot tell that `made` is as it is by default
    assert _known(Config(router="token_choice"), GROUP_OPTIONS | {"made"})
    assert not _known(Config(shared=1), GROUP_OPTIONS | {"made"})
    model = make_model()
    assert Stepper.of(model) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Stepper.of(model) is None
