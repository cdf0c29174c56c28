"""lm_eval over the text of a tiny model: its numbers are those of our own scoring. No network."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mmpt.__main__ import main
from mmpt.config import UserError
from mmpt.eval.heldout import evaluate_model
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.pipeline import Pipeline, save_model
from mmpt.processor import Processor
from mmpt.tokenizers.text import text_ids

QUESTIONS = [
    ("A cat is", ["an animal", "a colour", "a number"], 0),
    ("Red is", ["an animal", "a colour", "a number"], 1),
    ("Seven is", ["an animal", "a colour that nobody has ever seen", "a number"], 2),
    ("A dog is", ["a number", "an animal"], 1),
    ("Green is", ["a colour", "a number"], 0),
]


@pytest.fixture(scope="module")
def folder(processor: Processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = processor.vocabulary
    config = ModelConfig(
        vocab_size=len(vocabulary),
        width=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        expert_hidden=32,
        vocabulary=vocabulary.fingerprint,
    )
    model = Decoder.from_config(config)
    with torch.no_grad():  # so that answers differ
        for parameter in model.parameters():
            parameter.mul_(4)
    folder = tmp_path_factory.mktemp("model")
    save_model(model, processor, folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline.load(folder)


def requests(*arguments: tuple) -> list:
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    return [instance("", {}, each, index) for index, each in enumerate(arguments)]


def text_model(pipeline: Pipeline, **options: int):
    pytest.importorskip("lm_eval")
    from mmpt.eval.tasks import TextModel

    return TextModel(pipeline, **options)


@torch.no_grad()
def log_p(pipeline: Pipeline, ids: list[int], first: int) -> tuple[float, bool]:
    """A plain sum of log-probabilities of ids[first:], from one forward pass of one row."""
    hidden = pipeline.model(
        torch.tensor([ids]), modality=torch.zeros(1, len(ids), dtype=torch.int64)
    )
    scores = pipeline.model.logits(hidden[0]).float().log_softmax(-1)
    places = range(first, len(ids))
    best = all(int(scores[n - 1].argmax()) == ids[n] for n in places)
    return sum(float(scores[n - 1, ids[n]]) for n in places), best


def encode(pipeline: Pipeline, text: str) -> list[int]:
    return text_ids(pipeline.processor.text, text).tolist()


def begin(pipeline: Pipeline) -> int:
    return pipeline.processor.vocabulary.structure_id("<bod>")


def test_a_loglikelihood_is_the_plain_sum_and_batches_equal_singles(pipeline: Pipeline) -> None:
    model = text_model(pipeline)
    pairs = [(q, f" {c}") for q, choices, _ in QUESTIONS for c in choices]
    pairs += [("", "A cat"), ("A cat is ", "an animal"), ("  ", "x"), ("x", "\u00e9\u4e2d")]
    together = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    alone = [model.loglikelihood(requests(pair), disable_tqdm=True)[0] for pair in pairs]
    for (given, scored), (score, best), (single, _) in zip(pairs, together, alone, strict=True):
        before = encode(pipeline, given.rstrip())
        after = encode(pipeline, given[len(given.rstrip()) :] + scored)
        ids = [begin(pipeline), *before, *after]
        expected, greedy = log_p(pipeline, ids, 1 + len(before))
        assert score == pytest.approx(expected, abs=1e-5)
        assert score == pytest.approx(single, abs=1e-5)
        assert best == greedy


def test_what_is_greedy_is_what_is_generated(pipeline: Pipeline) -> None:
    model = text_model(pipeline)
    [made] = model.generate_until(requests(("A cat", {"max_gen_toks": 3, "until": []})))
    pipeline_says = pipeline("A cat", to="text", temperature=0.0, max_ids=3).parts[0].text
    assert made == pipeline_says


def test_generation_stops_and_a_batch_gives_what_singles_give(pipeline: Pipeline) -> None:
    model = text_model(pipeline)
    settings = {"max_gen_toks": 12, "until": []}
    asked = [(q, settings) for q, _, _ in QUESTIONS]
    whole = model.generate_until(requests(*asked), disable_tqdm=True)
    assert whole == [model.generate_until(requests(a), disable_tqdm=True)[0] for a in asked]
    stop = whole[0][2]
    cut = model.generate_until(
        requests((asked[0][0], {"max_gen_toks": 12, "until": [stop]}), asked[1]), disable_tqdm=True
    )
    assert cut == [whole[0][: whole[0].index(stop)], whole[1]]


def test_a_long_document_is_rolled_over(pipeline: Pipeline) -> None:
    model = text_model(pipeline, length=16)
    text = " ".join(f"word {number}" for number in range(20))
    ids = [begin(pipeline), *encode(pipeline, text)]
    assert len(ids) > 3 * 16
    expected, first = 0.0, 1
    while first < len(ids):  # windows of 15 ids, each behind the one id before it
        last = min(first + 15, len(ids))
        expected += log_p(pipeline, ids[(start := max(0, last - 16)) : last], first - start)[0]
        first = last
    rolled, short = model.loglikelihood_rolling(requests((text,), ("a cat",)))
    assert rolled == pytest.approx(expected, abs=1e-4)
    ids = [begin(pipeline), *encode(pipeline, "a cat")]
    assert short == pytest.approx(log_p(pipeline, ids, 1)[0], abs=1e-5)


def test_a_long_context_loses_its_oldest_ids(pipeline: Pipeline) -> None:
    model = text_model(pipeline, length=12)
    given, scored = encode(pipeline, "many words " * 20 + "and"), encode(pipeline, " a cat")
    [(score, _)] = model.loglikelihood(requests(("many words " * 20 + "and", " a cat")))
    kept = [begin(pipeline), *given[-(11 - len(scored)) :], *scored]
    assert len(kept) == 12
    assert score == pytest.approx(log_p(pipeline, kept, 12 - len(scored))[0], abs=1e-5)
    [made] = model.generate_until(
        requests(("many words " * 20, {"max_gen_toks": 4})), disable_tqdm=True
    )
    assert len(encode(pipeline, made)) <= 8


def test_a_continuation_that_merges_with_its_context_is_whole(pipeline: Pipeline) -> None:
    model = text_model(pipeline)
    text = "the animal"
    for cut in range(1, len(text)):
        given, scored = model._encode_pair(text[:cut], text[cut:])
        assert scored
        decoded = pipeline.processor.text.decode(torch.tensor([*given[1:], *scored])[:, None])
        assert decoded == text


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of one's own: a task file, and questions as JSON lines."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [{"question": q, "choices": c, "label": label} for q, c, label in QUESTIONS]
    (tmp_path / "task").mkdir()
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"""
task: kinds
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "questions.jsonl"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
    (tmp_path / "task" / "kinds.yaml").write_text(text)
    return tmp_path / "task"


def test_the_verb_counts_as_by_hand(
    task: Path, folder: Path, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(folder), "--tasks", "kinds", "--include-path", str(task), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    right, normed = [], []
    for question, choices, label in QUESTIONS:
        before = [begin(pipeline), *encode(pipeline, question)]
        scores = [
            log_p(pipeline, before + encode(pipeline, f" {choice}"), len(before))[0]
            for choice in choices
        ]
        right.append(int(np.argmax(scores)) == label)
        lengths = [len(choice) for choice in choices]
        normed.append(int(np.argmax(np.array(scores) / lengths)) == label)
    kinds = told["tasks"]["kinds"]
    assert kinds["acc"] == pytest.approx(np.mean(right))
    assert kinds["acc_norm"] == pytest.approx(np.mean(normed))
    assert told["fingerprint"] == pipeline.fingerprint
    assert main([*words, "--limit", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tasks"]["kinds"]["acc"] == pytest.approx(np.mean(right[:2]))
    assert math.isfinite(told["tasks"]["kinds"]["acc_stderr"])


def test_an_unknown_task_is_one_line(task: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="no task 'kindz'; did you mean 'kinds'"):
        evaluate_model(folder, tasks="kindz", include_path=task)


def test_data_that_is_not_there_is_one_line(task: Path, folder: Path) -> None:
    (task.parent / "questions.jsonl").unlink()
    with pytest.raises(UserError, match="the data of kinds cannot be had") as caught:
        evaluate_model(folder, tasks="kinds", include_path=task)
    assert "\n" not in str(caught.value)


def test_options_that_do_not_go_together_are_one_line(folder: Path, tmp_path: Path) -> None:
    for options in (
        {"tasks": "kinds", "tokens": tmp_path},
        {"limit": 3, "tokens": tmp_path},
        {},
    ):
        with pytest.raises(UserError, match="--tasks"):
            evaluate_model(folder, **options)


def test_a_missing_library_is_one_line_that_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mmpt.eval.tasks", None)
    with pytest.raises(UserError, match=r"pip install 'mmpt\[eval-text\]'"):
        evaluate_model(folder, tasks="kinds")
