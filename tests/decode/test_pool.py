"""Answers that step in turn share their passes, and come and go without a trace in the others."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mmpt.decode.ar import block_steps, generate_steps
from mmpt.decode.pool import Pool
from mmpt.decode.sampling import Sampling
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.step import Stepper
from mmpt.model.transformer import Decoder
from mmpt.stream import StreamBuilder
from mmpt.vocab import Modality, Vocabulary

SIZES: dict[str, Any] = {
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "expert_hidden": 16,
}


@pytest.fixture
def model(vocabulary: Vocabulary) -> Decoder:
    config = ModelConfig(
        vocab_size=len(vocabulary),
        groups={
            "text": GroupConfig(modalities=("text",)),
            "media": GroupConfig(
                modalities=("image", "video", "speech"),
                num_experts=4,
                num_active=2,
                router="token_choice",
            ),
        },
        **SIZES,
    )
    return Decoder.from_config(config, seed=0)


def answers(model: Decoder, vocabulary: Vocabulary, pool: Pool | None) -> list[Iterator[list[int]]]:
    """Texts and pictures of several lengths, with and without guidance, one and two at a time."""

    def text(number: int, sampling: Sampling, ids: int = 14) -> Iterator[list[int]]:
        prompt = StreamBuilder(vocabulary).structure("<bod>").text([1] * number).build().ids
        free = [vocabulary_null(vocabulary)] if sampling.guidance != 1 else None
        for step in generate_steps(
            model,
            vocabulary,
            [prompt],
            max_ids=ids,
            sampling=sampling,
            generators=[torch.Generator().manual_seed(number)],
            allow=(Modality.TEXT,),
            unconditional=free,
            pool=pool,
        ):
            yield [-1 if i is None else i for i in step.ids]

    def image(numbers: list[int], sampling: Sampling) -> Iterator[list[int]]:
        prompts = [
            StreamBuilder(vocabulary)
            .structure("<bod>")
            .text([2] * number)
            .header(Modality.IMAGE, (3, 4))
            .build()
            .ids
            for number in numbers
        ]
        for step in block_steps(
            model,
            vocabulary,
            prompts,
            modality=Modality.IMAGE,
            length=12,
            sampling=sampling,
            generators=[torch.Generator().manual_seed(number) for number in numbers],
            unconditional=[p[-4:] for p in prompts] if sampling.guidance != 1 else None,
            pool=pool,
        ):
            yield step.tolist()

    plain, guided = Sampling(top_p=0.9), Sampling(guidance=2.0)
    return [
        text(3, plain),
        text(30, plain, ids=9),
        text(5, Sampling(temperature=0)),
        text(7, guided),
        image([4], plain),
        image([1], plain),
        image([2, 9], guided),
        image([20], guided),
    ]


def vocabulary_null(vocabulary: Vocabulary) -> np.ndarray:
    return StreamBuilder(vocabulary).structure("<bod>", "<null>").build().ids


@pytest.mark.parametrize("gap", [0, 3])
def test_each_gets_what_it_gets_alone_whoever_comes_and_goes(
    model: Decoder, vocabulary: Vocabulary, gap: int
) -> None:
    alone = [list(each) for each in answers(model, vocabulary, None)]
    pool = Pool.of(model)
    assert pool is not None
    running = dict(enumerate(answers(model, vocabulary, pool)))
    found: list[list[list[int]]] = [[] for _ in running]
    for turn in range(100):
        for number in list(running):
            if turn < gap * number:
                continue  # this one begins later
            step = next(running[number], None)
            if step is None:
                del running[number]
            else:
                found[number].append(step)
    assert not running
    assert found == alone


def test_one_that_stops_in_the_middle_falls_out(model: Decoder, vocabulary: Vocabulary) -> None:
    wanted = list(answers(model, vocabulary, None)[4])
    pool = Pool.of(model)
    running = answers(model, vocabulary, pool)
    for _ in range(3):
        for each in running:
            next(each)
    kept = running[4]
    running.clear()
    del each  # the last that held one
    assert [*wanted[:3], *kept] == wanted


def test_passes_are_shared(
    model: Decoder, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    step = Stepper.__call__

    def counted(self: Stepper, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(ids))
        return step(self, ids, *rest)

    monkeypatch.setattr(Stepper, "__call__", counted)
    pictures = answers(model, vocabulary, Pool.of(model))[4:]
    for _ in range(8):
        for each in pictures:
            next(each)
    assert rows == [8] * 7  # samples, and the other branches of those that are guided
