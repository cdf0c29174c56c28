"""`mmpt report`: what a page on training runs shows, whatever the runs lack."""

import json
import math
import re

import numpy as np
import PIL.Image
import pytest
import soundfile

from mmpt.config import UserError
from mmpt.eval.runs import flops_per_id, read_run, read_runs, training_flops
from mmpt.eval.training import render_runs, report_command
from mmpt.page.curves import thin

MODEL = (
    "[model]\nvocab_size = 100\nwidth = 12\nnum_layers = 2\nnum_heads = 2\nnum_kv_heads = 1\n"
    "expert_hidden = 8\n"
)


def row(step, **changes):
    """A line of metrics.jsonl."""
    loss = 3 + 4 * math.exp(-step / 100)
    return {
        "step": step,
        "seconds": 0.5 * step,
        "tokens": 1000 * step,
        "step_tokens": 1000,
        "step_seconds": 0.5,
        "laps": {"data": 0.1, "forward": 0.15, "backward": 0.2},
        "lr": 1e-3,
        "grad_norm": 1.0,
        "loss": loss,
        "modality": {
            "text": {"loss": loss, "tokens": 700},
            "speech": {"loss": loss + 1, "tokens": 300},
        },
        "load": {"text": [[60, 40], [100, 0]], "speech": [[300], [300]]},
        "sources": {"books": 0.75, "voices": 0.25},
        "bad_steps": 0,
        "skipped": None,
    } | changes


@pytest.fixture
def make_run(tmp_path):
    """Writes a run folder."""

    def make(name, rows, *, recipe=f"steps = 40\n[optim]\nlr = 1e-3\n{MODEL}", tail=""):
        folder = tmp_path / name
        folder.mkdir()
        lines = "".join(json.dumps(each) + "\n" for each in rows)
        (folder / "metrics.jsonl").write_text(lines + tail)
        if recipe:
            (folder / "recipe.toml").write_text(recipe)
        return folder

    return make


@pytest.fixture
def page(read_page):
    """Folders -> their page."""
    return lambda *folders: read_page(render_runs(read_runs(folders)))


def test_a_page_compares_runs_and_needs_nothing_else(make_run, tmp_path, read_page):
    other = f"steps = 40\n[optim]\nlr = 3e-3\n{MODEL}"
    one = make_run("one", [row(n) for n in range(1, 41)])
    two = make_run("two", [row(n) for n in range(1, 21)], recipe=other)
    result = report_command([str(one), str(two)], out=tmp_path / "page.html")
    assert result["runs"] == {"one": 40, "two": 20}
    read = read_page((tmp_path / "page.html").read_text())
    assert read.asks_nothing()
    ids = [attrs["id"] for _, attrs in read.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert "optim.lr" in read.text  # the only key that differs
    assert "model.width" not in read.text
    for axis in ("over steps", "over ids", "over FLOPs", "over seconds"):
        assert axis in read.text
    labels = [attrs.get("aria-label") or "" for attrs in read.all("svg")]
    assert any(each.startswith("speech, at the end: one ") for each in labels)
    assert "text: 1 of 4 experts dead" in read.text
    assert "1 of 2 finished" in read.text


def test_half_a_line_at_the_end_is_left_out(make_run):
    run = read_run(make_run("going", [row(n) for n in range(1, 6)], tail='{"step": 6, "loss'))
    assert run.num_steps == 5


def test_runs_of_earlier_versions_are_shown(make_run, page):
    def old(step):
        kept = row(step, data_seconds=0.1, bad_steps=int(step > 3))
        return {k: v for k, v in kept.items() if k not in ("laps", "sources", "skipped")}

    folder = make_run("old", [old(n) for n in range(1, 9)], recipe="")
    run = read_run(folder)
    assert run.skipped == [(4, "not finite")]
    assert sum(w.laps["data"] for w in run.windows) == pytest.approx(0.8)
    assert sum(w.laps["compute"] for w in run.windows) == pytest.approx(3.2)
    assert np.isnan(training_flops(run)).all()
    assert "over FLOPs" not in page(folder).text


def test_a_folder_that_is_no_run_is_refused_in_one_line(make_run, tmp_path):
    (tmp_path / "quick").mkdir()
    make_run("quick/pretrain", [row(1)])
    for folders, words in (
        ([tmp_path / "nothing"], "no metrics.jsonl"),
        ([tmp_path / "quick"], "quick/pretrain"),
        ([make_run("empty", [])], "holds no step yet"),
        ([tmp_path / "quick/pretrain"] * 2, "twice"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            read_runs(folders)
        assert "\n" not in str(caught.value)


def test_skipped_steps_are_listed_by_reason(make_run, page):
    rows = [row(n, skipped="the loss spikes" if n in (3, 7) else None) for n in range(1, 11)]
    text = page(make_run("run", rows)).text
    assert re.search(r"the loss spikes\s*2\s*3, 7", text)


def test_values_that_are_missing_leave_no_trace(make_run, read_page):
    broken = [
        {"step": 1},
        row(2, loss=None, grad_norm=None, modality={"text": {"loss": None, "tokens": 5}}),
        row(3, modality={}, load={}, sources={}, laps={}),
        row(4, step_seconds=0.0),
    ]
    html = render_runs(read_runs([make_run("broken", broken)]))
    read = read_page(html)
    words = " ".join(v for _, attrs in read.elements for v in attrs.values() if v)
    assert not re.search(r"\b(nan|inf|None)\b", words + read.text)


def test_text_of_recipes_and_sources_stays_text(make_run, page):
    nasty = "<script>alert(1)</script>"
    rows = [row(n, sources={nasty: 1.0}, skipped=nasty) for n in range(1, 4)]
    read = page(make_run("nasty", rows, recipe=f'name = "{nasty}"'))
    assert not read.all("script")
    assert nasty in read.text


def test_held_out_losses_and_signals_are_drawn(make_run, page):
    folder = make_run("run", [row(n) for n in range(1, 41)])
    share = {"right": 0.5, "low": 0.4, "high": 0.6, "chance": 0.25, "trials": 40}
    rows = [
        {
            "step": step,
            "loss": {"text": {"nats": 5 - step / 40, "ids": 9}},
            "sources": {"books": {"text": {"nats": 4.5, "ids": 9}}},
            "choices": {"text given image": share},
            "probes": {"voice": share},
        }
        for step in (10, 20, 30)
    ]
    text = "".join(json.dumps(each) + "\n" for each in rows)
    (folder / "evaluations.jsonl").write_text(text + '{"step": 4')
    read = page(folder)
    labels = [attrs.get("aria-label") or "" for attrs in read.all("svg")]
    for words in ("held-out text", "text given image", "voice"):
        assert any(each.startswith(f"{words}, at the end") for each in labels)
    assert "books" in read.text


def test_a_long_run_keeps_its_spikes_on_a_small_page(make_run):
    spike = 777.0
    rows = [row(n, grad_norm=spike if n == 4321 else 1.0) for n in range(1, 5001)]
    html = render_runs([read_run(make_run("long", rows))])
    assert len(html) < 500_000
    values = np.ones(5000)
    values[4321] = spike
    assert 4321 in thin(values)
    assert len(thin(values)) <= 600


def test_eight_runs_make_a_page_below_two_megabytes(make_run):
    rows = [row(n) for n in range(1, 401)]
    folders = [make_run(f"run-{n}", rows) for n in range(8)]
    assert len(render_runs(read_runs(folders))) < 2_000_000


def test_flops_are_six_per_active_weight_and_id(make_run):
    run = read_run(make_run("run", [row(1), row(2)]))
    per_id = flops_per_id(run.model)
    assert per_id["text"] % 6 == 0
    assert per_id["text"] > per_id["speech"]  # a router more
    assert training_flops(run)[-1] == 2 * (700 * per_id["text"] + 300 * per_id["speech"])


def test_many_experts_are_a_dense_map(make_run):
    loads = {"text": (np.arange(64 * 24).reshape(24, 64) % 7).tolist()}
    rows = [row(n, load=loads) for n in range(1, 4)]
    html = render_runs([read_run(make_run("wide", rows))])
    assert "layer 24, expert 64" in html
    assert len(html) < 500_000


def test_samples_of_the_run_folder_are_shown_and_no_other_files(make_run, page):
    folder = make_run("run", [row(1), row(2)])
    (folder / "samples" / "step-2").mkdir(parents=True)
    PIL.Image.new("RGB", (8, 8)).save(folder / "samples" / "step-2" / "grid.png")
    soundfile.write(folder / "samples" / "step-2" / "said.wav", np.zeros(800), 16_000)
    (folder / "samples" / "notes.html").write_text("<script>")
    (folder / "samples" / "large.wav").write_bytes(bytes(1_000_000))
    read = page(folder)
    assert read.asks_nothing()
    assert [attrs["alt"] for attrs in read.all("img")] == ["step-2/grid.png"]
    assert [attrs["aria-label"] for attrs in read.all("audio")] == ["step-2/said.wav"]
    assert "1 more are in the folder" in read.text


def test_a_routers_entropy_is_the_mean_of_its_layers(make_run):
    told = [{"entropy": [0.9, 0.7]}, {"entropy": [None, None]}, {}]
    rows = [row(n, router={"text": each}) for n, each in enumerate(told, 1)]
    [run] = read_runs([make_run("one", rows)])
    assert run.get("entropy text") == pytest.approx([0.8, math.nan, math.nan], nan_ok=True)
    assert "router entropy of text" in render_runs([run])
