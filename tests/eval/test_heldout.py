"""Held-out likelihood: what is counted, beside what, and that a condition can be seen to help."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.data.shards import is_heldout
from mmpt.data.tokens import EncodedDocument, ShardWriter
from mmpt.eval.heldout import (
    OTHERS,
    _with_others,
    content_streams,
    evaluate_modality,
    evaluate_model,
)
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.stream import Segment
from mmpt.vocab import Modality, Vocabulary

NEWLINE = np.array([10])


def _documents(count: int, *, heldout: bool) -> list[EncodedDocument]:
    rng = np.random.default_rng(int(heldout))
    documents: list[EncodedDocument] = []
    number = 0
    while len(documents) < count:
        number += 1
        if is_heldout(base := f"idea-{number}") != heldout:
            continue
        segments = [
            Segment(Modality.TEXT, rng.integers(0, 50, 4)),
            Segment(Modality.IMAGE, rng.integers(0, 64, (4, 4))),
            Segment(Modality.VIDEO, np.repeat(rng.integers(0, 64, (1, 2, 2)), 3, axis=0)),
            Segment(Modality.SPEECH, rng.integers(0, 512, 30)),
        ]
        documents.append(EncodedDocument(base, base, "any", segments))
    return documents


@pytest.fixture
def model(vocabulary: Vocabulary) -> Decoder:
    config = ModelConfig(
        vocab_size=len(vocabulary),
        width=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        expert_hidden=16,
        vocabulary=vocabulary.fingerprint,
    )
    return Decoder.from_config(config).eval()


def test_only_content_is_scored(vocabulary: Vocabulary) -> None:
    [document] = _documents(1, heldout=True)
    sizes = {Modality.TEXT: 4, Modality.IMAGE: 16, Modality.VIDEO: 12, Modality.SPEECH: 30}
    for order in ("any", "fixed"):
        for modality, size in sizes.items():
            laid = EncodedDocument(document.key, document.base, order, document.segments)
            [stream] = content_streams(laid, vocabulary, modality, NEWLINE)
            scored = stream.loss_weight > 0
            assert scored.sum() == size
            allowed = vocabulary.allowed[modality][stream.ids[scored]]
            assert allowed.all()


def test_a_model_that_knows_nothing_pays_for_the_whole_vocabulary(
    model: Decoder, vocabulary: Vocabulary
) -> None:
    train, held = _documents(20, heldout=False), _documents(6, heldout=True)
    for modality in Modality:
        row = evaluate_modality(model, vocabulary, modality, train, held, NEWLINE)
        assert row["nats"] == pytest.approx(math.log(len(vocabulary)), rel=0.05)
        assert row["unigram_nats"] < row["nats"]  # the medium alone says that much
        low, mean, high = row["shuffled_minus_right"]
        assert low <= mean <= high
        assert abs(mean) < 0.05
    # copied frames are what the video baseline knows
    video = evaluate_modality(model, vocabulary, Modality.VIDEO, train, held, NEWLINE)
    assert video["baseline_nats"] < 0.6 * video["unigram_nats"]


def test_a_folder_of_token_shards_is_evaluated(
    model: Decoder,
    vocabulary: Vocabulary,
    tmp_path: Path,
    make_vocabulary: Callable[..., Vocabulary],
) -> None:
    tokens, folder = tmp_path / "tokens", tmp_path / "model"
    for name, heldout in (("train", False), ("heldout", True)):
        with ShardWriter(tokens / f"{name}.tokens.tar", vocabulary, separator=NEWLINE) as writer:
            for document in _documents(5, heldout=heldout):
                writer.add(document)
            writer.finish()
    vocabulary.save(tokens / "vocabulary.json")
    model.save(folder)
    result = evaluate_model(folder, tokens=tokens)
    assert set(result["heldout"]) == {"text", "image", "video", "speech"}
    make_vocabulary("another-image-codec").save(tokens / "vocabulary.json")
    with pytest.raises(UserError) as caught:
        evaluate_model(folder, tokens=tokens)
    assert "\n" not in str(caught.value)


def test_a_document_is_given_the_conditions_of_several_others_of_another_idea():
    def document(number: int) -> EncodedDocument:
        parts = [Segment(Modality.TEXT, np.arange(3)), Segment(Modality.SPEECH, np.arange(4))]
        return EncodedDocument(f"d-{number}", f"idea-{number // 2}", "any", parts)

    documents = [document(number) for number in range(12)]
    told = list(_with_others(documents, Modality.SPEECH))
    assert [one.key for one, _ in told] == [one.key for one in documents]
    for one, others in told:
        assert len({other.key for other in others}) == OTHERS > 1
        assert one.base not in {other.base for other in others}
    assert not list(_with_others(documents[:2], Modality.SPEECH))  # nobody else to ask
