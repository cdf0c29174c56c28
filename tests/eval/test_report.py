"""report.html: one file that needs nothing else, shows text as text, and bears what is missing."""

import base64
import io
import math
import re
import wave

import numpy as np
import PIL.Image
import pytest

from mmpt.eval.page.plots import Likelihood, likelihood_chart
from mmpt.eval.report import Gallery, Report, Stage, render_report, write_report
from mmpt.page.cells import animation_uri, picture_uri, sound_uri, spectrogram
from mmpt.page.frame import ticks
from mmpt.parts import Audio, Image, Text, Video

NASTY = "<boi> <script>alert('1')</script> & \"quoted\" \x00\ud800 </textarea>"


def picture(seed: int = 0, size: int = 64) -> Image:
    values = np.random.default_rng(seed).integers(0, 255, (8, 8, 3))
    return Image(values.repeat(size // 8, 0).repeat(size // 8, 1).astype(np.uint8))


def clip() -> Video:
    return Video(np.stack([np.roll(picture().pixels, i, 1) for i in range(5)]), 10.0)


def sound(seconds: float = 0.3) -> Audio:
    time = np.arange(round(16_000 * seconds)) / 16_000
    return Audio((0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32), 16_000)


def metrics(steps: int, **changes: object) -> list[dict]:
    def row(step: int) -> dict:
        loss = 3 + 4 * math.exp(-step / 10)
        names = ("text", "image", "video", "speech")
        return {
            "step": step,
            "modality": {name: {"loss": loss, "tokens": 50} for name in names},
            "load": {
                "text": [[10, 30], [20, 20]],
                "visual": [[5, 5], [0, 10]],
                "speech": [[9], [9]],
            },
            "bad_steps": 0,
        } | changes

    return [row(step) for step in range(1, steps + 1)]


def measured(nats: float, baseline: float = 3.0, interval: tuple = (0.1, 0.2, 0.3)) -> dict:
    return {
        "tokens": 1234,
        "nats": nats,
        "unigram_nats": 5.0,
        "baseline_nats": baseline,
        "baseline": "bigram",
        "shuffled_nats": nats + 0.2,
        "shuffled_minus_right": list(interval),
    }


def full_report() -> Report:
    return Report(
        title="quickstart",
        command="mmpt quickstart --out runs/quickstart",
        stages=[Stage(name="encode", seconds=12.3, detail="a"), Stage(name="train", seconds=200.0)],
        peak_gib=3.4,
        heldout={
            "text": measured(2.0),
            "image": measured(2.5),
            "video": measured(1.5, interval=(-0.1, 0.0, 0.1)),
            "speech": measured(4.0, 3.5),
        },
        curves={"pretraining": metrics(60), "adaptation": metrics(30)},
        codecs=[
            {
                "name": "image-f8",
                "modality": "image",
                "codebook_size": 1000,
                "rate": "64 codes",
                "fingerprint": "abc",
                "heldout": {"psnr": 23.0, "usage": 0.98},
                "baseline": {"psnr": 21.0},
            }
        ],
        data={"documents": 7, "modalities": {"text": {"parts": 3}, "image": {"parts": 4}}},
        environment={"python": "3.11", "packages": {"torch": "2.11"}, "problems": []},
        galleries=[
            Gallery(
                title="Pictures",
                text="Originals beside ours.",
                columns=("label", "original", "ours"),
                rows=[[Text("red apple"), picture(0), picture(1)], ["fire", clip(), None]],
            ),
            Gallery(
                title="Sounds",
                text="",
                columns=("given", "said"),
                rows=[[[Text("hi"), picture(2)], sound()]],
            ),
        ],
        provenance={"seed": 0, "settings": {"passes": 12}},
    )


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(full_report())


def test_the_page_is_well_formed_and_its_ids_and_links_agree(html, read_page):
    page = read_page(html)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"] for attrs in page.all("a")} <= {f"#{each}" for each in ids}


def test_the_page_asks_nothing_of_anyone(html, read_page):
    page = read_page(html)
    assert not page.all("script", "link", "iframe", "object")
    for _, attrs in page.elements:
        for key in ("src", "srcset", "poster", "data"):
            assert (attrs.get(key) or "data:").startswith("data:")
        assert not any(key.startswith("on") for key in attrs)
    assert not re.search(r"https?://|url\(|@import", html)
    [policy] = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert "default-src 'none'" in policy


def test_pictures_charts_and_players_have_names(html, read_page):
    page = read_page(html)
    assert any(attrs["alt"] == "original: red apple" for attrs in page.all("img"))
    assert all(attrs["aria-label"] == "said: hi" for attrs in page.all("audio"))
    for attrs in page.all("svg"):
        nested = attrs.get("class") == "mark"
        assert nested or attrs.get("aria-label") or attrs.get("aria-hidden")


def test_text_of_users_and_models_stays_text(read_page):
    report = Report(
        title=NASTY,
        command=NASTY,
        stages=[Stage(name=NASTY, seconds=1.0, detail=NASTY)],
        heldout={"text": measured(2.0) | {"baseline": NASTY}, NASTY: measured(1.0)},
        curves={NASTY: metrics(5, load={NASTY: [[1, 2]]})},
        codecs=[{"name": NASTY, "modality": NASTY, "rate": NASTY, "fingerprint": NASTY}],
        data={NASTY: NASTY, "table": {NASTY: {NASTY: NASTY}}},
        environment={NASTY: [NASTY]},
        galleries=[
            Gallery(title=NASTY, text=NASTY, columns=(NASTY, NASTY), rows=[[NASTY, picture()]])
        ],
        provenance={NASTY: {NASTY: None}},
    )
    page = read_page(render_report(report))
    assert not page.all("script", "boi", "textarea")
    assert "<boi> <script>alert('1')</script> & \"quoted\"" in page.text
    assert "\x00" not in page.text


def test_a_run_that_did_nothing_still_has_a_page(read_page):
    page = read_page(render_report(Report(title="stopped", command="")))
    assert "Nothing was recorded here" in page.text
    assert "\u2014" in page.text


def test_values_that_are_missing_or_not_finite_are_dashes(read_page):
    nan = float("nan")
    report = Report(
        title="half",
        command="x",
        stages=[Stage(name="encode", seconds=nan)],
        peak_gib=nan,
        heldout={
            "text": {"nats": nan, "tokens": None},
            "image": {},
            "video": {"nats": 2.0, "unigram_nats": 0.0, "shuffled_minus_right": [None, 0.1, nan]},
            "speech": {"nats": 2.0, "unigram_nats": None, "shuffled_minus_right": None},
        },
        curves={
            "pretraining": [{"step": 1}, {}, *metrics(3, modality={"text": {"loss": None}})],
            "adaptation": [],
        },
        codecs=[{"name": "a", "modality": "text", "heldout": None, "baseline": None}],
        data={"seconds": math.inf, "frames": None},
        galleries=[
            Gallery(title="none", text="", columns=(), rows=[]),
            Gallery(title="short", text="", columns=("a", "b"), rows=[[None], ["", [], "more"]]),
        ],
    )
    html = render_report(report)
    assert not re.search(r"\b(nan|inf|None)\b", read_page(html).text)
    attributes = " ".join(
        str(each) for _, attrs in read_page(html).elements for each in attrs.values()
    )
    assert not re.search(r"\b(nan|inf)\b", attributes)


def test_the_page_says_where_the_model_is_not_better(html, read_page):
    text = read_page(html).text
    assert "better than the baseline in 3 of 4 media" in text
    assert "Not better than the baseline (bigram): 4.00 against 3.50 nats." in text
    assert "No sure effect of the condition" in text
    assert text.count("not ahead of the baseline") == 1


def test_the_wrong_condition_is_compared_on_the_same_documents(read_page):
    row = measured(2.0) | {"shuffled_nats": 3.4, "conditioned_nats": 3.0}
    marks = read_page(render_report(Report(title="t", command="", heldout={"text": row}))).all(
        "circle"
    )
    [shuffled] = [attrs["cx"] for attrs in marks if attrs["class"] == "shuffled"]
    [ours] = [a["cx"] for a in marks if a["class"] == "ours" and a["r"] == "6.5"]
    top = 1.06
    assert shuffled == f"{2 + 95 * 2.4 / 5 / top:.2f}%"
    assert ours == f"{2 + 95 * 2.0 / 5 / top:.2f}%"


def test_the_head_shows_one_row_of_every_kind_of_output(html):
    head = html.partition("<nav")[0]
    assert head.count("<article") == 2
    assert 'href="#gallery-1"' in head
    assert 'href="#gallery-2"' in head


def test_expert_loads_become_shares_of_a_layer(html):
    titles = re.findall(r"<title>(layer [^<]+)</title>", html)
    assert "layer 1, expert 1: 25.0%" in titles
    assert "layer 2, expert 2: 100.0%" in titles


def test_pictures_and_sounds_survive_as_they_are():
    pixels, audio, video = picture().pixels, sound(), clip()
    back = np.asarray(PIL.Image.open(_decoded(picture_uri(pixels))))
    np.testing.assert_array_equal(back, pixels)
    with wave.open(_decoded(sound_uri(audio))) as file:
        assert (file.getframerate(), file.getsampwidth()) == (16_000, 2)
        samples = np.frombuffer(file.readframes(-1), "<i2") / 32767
    np.testing.assert_allclose(samples, audio.wave, atol=1e-4)
    animation = PIL.Image.open(_decoded(animation_uri(video)))
    assert animation.n_frames == 5
    animation.seek(3)
    np.testing.assert_array_equal(np.asarray(animation.convert("RGB")), video.frames[3])


@pytest.mark.parametrize("wave_length", [1, 100, 4000, 16_000 * 60])
def test_a_spectrogram_is_small_whatever_the_sound(wave_length):
    quiet = spectrogram(Audio(np.zeros(wave_length, np.float32), 16_000))
    assert quiet[..., 3].max() == 0
    tone = (
        spectrogram(Audio(sound(wave_length / 16_000).wave, 16_000)) if wave_length > 500 else quiet
    )
    assert tone.shape[0] == 48
    assert tone.shape[1] <= 330


def test_ticks_are_round_and_inside():
    assert ticks(0, 1.06, 6) == [0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(2.0, 2.0) == [2.0]
    for low, high in ((-0.31, 0.42), (1e-6, 3e-6), (0, 12_345)):
        assert all(low <= value <= high for value in ticks(low, high))
        assert 2 <= len(ticks(low, high)) <= 9


def test_a_chart_without_any_measure_is_still_a_chart():
    row = Likelihood(name="text", ours=None, unigram=None, baseline=None, shuffled=None)
    assert "not measured" in likelihood_chart([row])
    assert likelihood_chart([])


def test_the_page_stays_small(html):
    assert len(html) < 200_000
    long = Report(title="t", command="", curves={"pretraining": metrics(5_000)})
    assert len(render_report(long)) < 120_000


def test_writing_is_atomic_and_says_where(tmp_path):
    path = write_report(tmp_path / "deep" / "report.html", full_report())
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]


def _decoded(uri: str) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(uri.partition(",")[2]))
