"""The quality gate: what is drawn and kept, what counts, and that it runs from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.data.shards import Document, is_heldout, write_shard
from mmpt.data.tokens import EncodedDocument, ShardWriter
from mmpt.eval.compare import ONE_PASS, SHUFFLED, compare_decoders, roll_up, why_not
from mmpt.eval.gate_metrics import CodeEntropy, DistinctCodes, SpokenErrors, sayable
from mmpt.eval.gate_pictures import picture_judge
from mmpt.eval.gate_samples import Answer, Prompt, System, find_prompts, real_system
from mmpt.eval.gate_stats import Margin, Outcome, value
from mmpt.eval.heldout import evaluate_model
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.parts import Image, Text
from mmpt.pipeline import save_model
from mmpt.processor import Processor
from mmpt.stream import Segment
from mmpt.tokenizers.text import text_ids
from mmpt.vocab import Modality

RECIPE = """
num_prompts = 3
given_frames = 1
pictures = ["{folder}/pictures.tar"]
epochs = 1
num_shown = 2
[compare.ar]
decoder = "ar"
height = 16
width = 16
frames = 5
[compare.dida]
decoder = "dida"
num_passes = 2
height = 16
width = 16
frames = 5
[prompts]
image = ["all.tokens.tar"]
video = ["all.tokens.tar"]
[classes]
red = ["red"]
blue = ["blue"]
"""


def _documents(processor: Processor, count: int, *, heldout: bool = True) -> list[EncodedDocument]:
    rng, found, number = np.random.default_rng(0), [], 0
    while len(found) < count:
        number += 1
        if is_heldout(base := f"idea-{number}") != heldout:
            continue
        words = Segment(Modality.TEXT, text_ids(processor.text, ("red", "blue")[len(found) % 2]))
        picture = Segment(Modality.IMAGE, rng.integers(0, 64, (2, 2)))
        clip = Segment(Modality.VIDEO, rng.integers(0, 64, (2, 2, 2)))
        found.append(EncodedDocument(base, base, "any", [picture, words, clip]))
    return found


def _pictures(count: int, *, seed: int) -> list[Document]:
    """Red and blue ones of training documents, with noise."""
    rng, found, number = np.random.default_rng(seed), [], 0
    while len(found) < count:
        number += 1
        if is_heldout(base := f"picture-{number}"):
            continue
        pixels = rng.integers(0, 90, (16, 16, 3)).astype(np.uint8)
        pixels[..., 2 * (number % 2)] += 150
        word = ("red", "blue")[number % 2]
        found.append(Document(base, base, "any", [Text(f"a {word} thing"), Image(pixels)]))
    return found


@pytest.fixture
def gate(processor: Processor, tmp_path: Path) -> Path:
    """A folder with a model, tokens, pictures and a recipe."""
    vocabulary = processor.vocabulary
    config = ModelConfig(
        vocab_size=len(vocabulary),
        width=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        expert_hidden=16,
        vocabulary=vocabulary.fingerprint,
    )
    model = Decoder.from_config(config)
    model.add_noisy_groups()
    save_model(model, processor, tmp_path / "model")
    (tmp_path / "tokens").mkdir()
    path = tmp_path / "tokens" / "all.tokens.tar"
    with ShardWriter(path, vocabulary, separator=processor.separator) as writer:
        for document in _documents(processor, 4):
            writer.add(document)
        writer.finish()
    write_shard(tmp_path / "pictures.tar", _pictures(8, seed=0))
    (tmp_path / "gate.toml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def _run(gate: Path, *overrides: str, names: str = "ar,dida") -> dict:
    return compare_decoders(
        gate / "model",
        overrides,
        tokens=gate / "tokens",
        names=names,
        recipe=gate / "gate.toml",
        out=gate / "out",
    )


def test_the_gate_runs_and_does_not_draw_again(gate: Path, read_page):
    result = _run(gate)
    image, video = result["media"]["image"], result["media"]["video"]
    assert (image["prompts"], image["samples"]) == (3, 3)
    assert image["verdicts"] == video["verdicts"] == {"dida": "cannot tell"}  # of three prompts
    assert [row["metric"] for row in image["metrics"]] == [
        "likelihood",
        "feature distance",
        "kernel distance",
        "accuracy",
        "entropy of codes",
        "distinct codes",
    ]
    assert all("too few" in row["why_not"] for row in image["metrics"] if not row["guard"])
    page = read_page((gate / "out" / "gate.html").read_text())
    assert page.asks_nothing()
    assert "cannot tell" in page.text
    assert json.loads((gate / "out" / "gate.json").read_text())["media"] == result["media"]

    drawn = {path: path.stat().st_mtime_ns for path in gate.rglob("samples/image/*/*.json")}
    lost = next(path for path in drawn if path.name != "settings.json")
    before = json.loads(lost.read_text())["ids"]
    lost.unlink()
    again = _run(gate, 'prompts={image=["all.tokens.tar"]}')
    assert again["media"]["image"]["metrics"] == image["metrics"]
    assert json.loads(lost.read_text())["ids"] == before
    same = [path for path in drawn if path.stat().st_mtime_ns == drawn[path]]
    assert {path for path in drawn if path not in same} <= {lost, lost.with_name("settings.json")}


def test_the_distances_of_torch_fidelity_are_on_the_page(gate: Path, inception_weights, read_page):
    only = 'prompts={image=["all.tokens.tar"]}'
    image = _run(gate, only, f"inception={inception_weights}", "num_prompts=2")["media"]["image"]
    rows = {row["metric"]: row for row in image["metrics"]}
    for name in ("FID, InceptionV3", "KID, InceptionV3"):
        assert set(rows[name]["values"]) == {"ar", "dida", SHUFFLED, ONE_PASS, "real"}
        assert rows[name]["values"]["real"] == pytest.approx(0, abs=1e-3)
        assert name in read_page((gate / "out" / "gate.html").read_text()).text
    with pytest.raises(UserError, match="inception"):
        _run(gate, only, f"inception={gate / 'gate.toml'}")


def test_mistakes_are_told_in_one_line(gate: Path):
    asked = [
        lambda: _run(gate, names="ar"),
        lambda: _run(gate, names="ar,other"),
        lambda: _run(gate, "compare.dida.num_pases=3"),
        lambda: _run(gate, "compare.dida.decoder=ar"),
        lambda: _run(gate, 'prompts={text=["all.tokens.tar"]}'),
        lambda: _run(gate, "given_frames=2"),
        lambda: evaluate_model(gate / "model", tokens=gate / "tokens", compare="ar,dida"),
        lambda: evaluate_model(gate / "model", ["seed=1"], tokens=gate / "tokens"),
    ]
    for call in asked:
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_prompts_are_held_out_ideas_and_answers_count_their_own_codes_alone(processor: Processor):
    documents = _documents(processor, 5) + _documents(processor, 5, heldout=False)
    prompts = find_prompts(documents, processor, "video", count=9, given_frames=1)
    assert sorted(p.key for p in prompts) == sorted(d.key for d in documents[:5])
    real = real_system(prompts, processor)
    answer = real.answers[0]
    stream = answer.stream(processor.vocabulary, processor.separator)
    assert stream.loss_weight.sum() == len(answer.codes) == 4  # one of two latent frames
    counted = stream.ids[stream.loss_weight > 0]
    assert (processor.vocabulary.codes_of(Modality.VIDEO, counted) == answer.codes).all()
    others = real.shuffled().answers
    assert [a.prompt for a in others] == [*prompts[1:], prompts[0]]
    assert (others[0].codes == answer.codes).all()
    assert (others[0].segments[0].codes[:1] == prompts[1].begin).all()


def test_speech_is_asked_for_by_its_transcript_alone(processor: Processor):
    [base] = [d.base for d in _documents(processor, 1)]
    words, sound = Segment(Modality.TEXT, np.arange(3)), Segment(Modality.SPEECH, np.arange(30))
    one = EncodedDocument("one", base, "any", [words, sound])
    many = EncodedDocument("many", base, "any", [words, words, sound])
    [prompt] = find_prompts([many, one], processor, "speech", count=9, given_frames=1)
    assert prompt.key == "one"
    assert [len(segment.codes) for segment in prompt.real] == [26, 4]


def test_guards_see_when_fewer_codes_are_used(processor: Processor):
    def system(codes: np.ndarray) -> System:
        prompts = [Prompt(str(n), ("a",), [], []) for n in range(len(codes))]
        segments = [[Segment(Modality.IMAGE, each)] for each in codes]
        pairs = zip(prompts, segments, range(len(codes)), strict=True)
        return System("s", [Answer(*pair) for pair in pairs], processor)

    many, few = np.arange(32).reshape(2, 4, 4), np.zeros((2, 4, 4), dtype=np.int64)
    margin = Margin(size=0.05, relative=True, higher_is_better=True)
    entropy = CodeEntropy(vocabulary=processor.vocabulary, modality=Modality.IMAGE, margin=margin)
    assert value(entropy.measure(system(many))) == pytest.approx(np.log(32))
    assert value(entropy.measure(system(few))) == pytest.approx(0)
    distinct = DistinctCodes(margin=margin)
    assert value(distinct.measure(system(few))) == pytest.approx(1 / 16)


def test_the_judge_of_pictures_learns_and_is_kept(tmp_path: Path):
    write_shard(tmp_path / "pictures.tar", _pictures(40, seed=0))
    classes = {"red": ("red", "crimson"), "blue": ("blue",)}
    shards = [str(tmp_path / "*.tar")]
    judge = picture_judge(shards, classes, epochs=4, seed=0, folder=tmp_path)
    fresh = _pictures(20, seed=1)
    pixels = [part.pixels for d in fresh for part in d.parts if isinstance(part, Image)]
    labels = [
        judge.labels([part.text for part in d.parts if isinstance(part, Text)]) for d in fresh
    ]
    right = np.stack(labels)[np.arange(20), judge.guesses(pixels)]
    assert right.mean() > 0.9
    assert judge.labels(["Crimson"]).tolist() == [True, False]
    again = picture_judge(shards, classes, epochs=4, seed=0, folder=tmp_path)
    assert (again.features(pixels) == judge.features(pixels)).all()
    with pytest.raises(UserError, match="green"):
        picture_judge(shards, {**classes, "green": ("green",)}, epochs=1, seed=0, folder=tmp_path)


def test_a_metric_counts_only_if_both_controls_are_rejected():
    def outcome(verdict, low: float | None = 0.5) -> Outcome:
        return Outcome(1.0, 2.0, 1.0, low, low, verdict, 30)

    told = {SHUFFLED: outcome("inferior"), ONE_PASS: outcome("inferior")}
    assert why_not(told) == ""
    assert "other prompts" in why_not({**told, SHUFFLED: outcome("not inferior")})
    assert "one pass" in why_not({**told, ONE_PASS: outcome("cannot tell")})


def test_a_candidate_passes_only_where_all_that_counts_does():
    def row(verdict: str, *, counts: bool = True, guard: bool = False) -> dict:
        return {"counts": counts, "guard": guard, "tests": {"dida": {"verdict": verdict}}}

    good, bad, unsure = row("not inferior"), row("inferior"), row("cannot tell")
    guard = row("not inferior", counts=False, guard=True)
    assert roll_up([good, guard], "dida") == "not inferior"
    assert roll_up([good, bad], "dida") == "inferior"
    assert roll_up([good, unsure], "dida") == "cannot tell"
    assert roll_up([guard], "dida") == "cannot tell"  # guards are no evidence of quality
    assert roll_up([good, row("inferior", counts=False)], "dida") == "not inferior"
    assert roll_up([good, row("inferior", counts=False, guard=True)], "dida") == "inferior"


def test_words_of_a_wave_that_says_nothing_are_all_wrong(processor: Processor):
    pytest.importorskip("pocketsphinx")
    from mmpt.tokenizers.judge import GrammarJudge

    texts = [("open the door",), ("close the window",), ("qqzx",)]
    codes = [Segment(Modality.SPEECH, np.zeros(4, dtype=np.int64))]
    prompts = sayable([Prompt(str(n), text, [], codes) for n, text in enumerate(texts)])
    assert [prompt.texts for prompt in prompts] == texts[:2]  # the last is in no dictionary
    judge = GrammarJudge([prompt.texts[0] for prompt in prompts])
    errors = SpokenErrors(recogniser=judge, margin=Margin(size=0.03))
    assert value(errors.measure(real_system(prompts, processor))) > 0.5
