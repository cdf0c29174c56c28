"""`mmpt scaling`: planted laws are found within their intervals, shuffled losses give none."""

import json

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.eval.powerlaw import fit_law
from mmpt.eval.runs import flops_per_id
from mmpt.eval.scaling import scaling_command

FLOOR, ALPHA = 2.0, 0.3


def model(width):
    return {
        "vocab_size": 100,
        "width": width,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "expert_hidden": 2 * width,
    }


def compute(width, steps):
    """Of a run that reads 800 text and 200 speech ids a step."""
    per_id = flops_per_id(model(width))
    return steps * (800 * per_id["text"] + 200 * per_id["speech"])


SIZES = [(8, 40), (12, 80), (16, 160), (24, 300), (32, 700), (48, 1200), (64, 2500), (96, 5000)]
FLOPS = np.array([compute(*size) for size in SIZES])
FACTOR = 3.0 * FLOPS[0] ** ALPHA


@pytest.fixture
def make_runs(tmp_path):
    """Writes run folders whose losses follow the law, with noise; `order` shuffles them."""

    def make(*, noise=0.003, seed=0, order=None, count=None, finished=True):
        rng = np.random.default_rng(seed)
        text = (FLOOR + FACTOR * FLOPS**-ALPHA) * np.exp(noise * rng.standard_normal(len(FLOPS)))
        text = text if order is None else text[order]
        folders = []
        for (width, steps), nats in list(zip(SIZES, text, strict=True))[:count]:
            folder = tmp_path / f"run-{seed}-{len(folders)}"
            folder.mkdir(exist_ok=True)
            write_run(folder, width, steps, {"text": nats, "speech": 4.0 + nats}, finished=finished)
            folders.append(str(folder))
        return folders

    return make


def write_run(folder, width, steps, nats, *, finished=True):
    """A run of a few long steps, as training writes it."""
    lines = []
    for part in range(1, 5):
        ids = {"text": 200 * steps, "speech": 50 * steps}
        step = part * steps // 4
        lines.append(
            {
                "step": step,
                "tokens": 250 * steps * part,
                "modality": {m: {"loss": nats[m] + 1 / part, "tokens": n} for m, n in ids.items()},
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    planned = steps // 4 * 4 if finished else 10 * steps
    table = "\n".join(f"{key} = {value}" for key, value in model(width).items())
    (folder / "recipe.toml").write_text(f"steps = {planned}\n[model]\n{table}\n")
    rows = [
        {"step": step, "loss": {m: {"nats": n + late, "ids": 9} for m, n in nats.items()}}
        for step, late in ((steps // 4, 1.0), (steps // 4 * 4, 0.0))
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))


def inside(value, interval):
    return interval[1] <= value <= interval[2]


def test_a_planted_law_is_found_within_its_intervals(make_runs, tmp_path, read_page):
    result = scaling_command(make_runs(), out=tmp_path / "page.html")
    law = result["laws"]["text"]
    assert inside(FLOOR, law["E"])
    assert inside(ALPHA, law["alpha"])
    assert inside(FACTOR, law["A"])
    target = 4 * FLOPS.max()
    assert result["next_flops"] == pytest.approx(target)
    expected = FLOOR + FACTOR * target**-ALPHA
    assert inside(expected, law["next_nats"])
    assert law["next_nats"][2] - law["next_nats"][1] < 0.2  # it says something
    assert law["alpha"][2] - law["alpha"][1] < 0.15
    assert law["law"]
    assert inside(4.0 + FLOOR, result["laws"]["speech"]["E"])
    page = read_page((tmp_path / "page.html").read_text())
    assert page.asks_nothing()
    assert "a law holds for 2 of 2 media" in page.text


def test_shuffled_losses_are_no_law(make_runs, tmp_path, read_page):
    order = np.random.default_rng(1).permutation(len(SIZES))
    result = scaling_command(make_runs(order=order), out=tmp_path / "page.html")
    law = result["laws"]["text"]
    assert not law["law"]
    assert law["explained"] < 0.5
    assert law["alpha"][2] - law["alpha"][1] > 1  # nothing is known
    assert "no law" in read_page((tmp_path / "page.html").read_text()).text


def test_intervals_cover_the_planted_values_most_of_the_time():
    sizes = np.geomspace(1e15, 1e18, 6)[:, None]
    planted = FLOOR + 3 * (sizes[:, 0] / 1e15) ** -ALPHA
    hits = 0
    for seed in range(5):
        noise = np.random.default_rng(seed).standard_normal(6)
        law = fit_law(sizes, planted * np.exp(0.005 * noise))
        hits += law.exponent().low <= ALPHA <= law.exponent().high
    assert hits >= 4


def test_one_run_that_went_wrong_moves_little():
    sizes = np.geomspace(1e15, 1e18, 9)[:, None]
    losses = FLOOR + 3 * (sizes[:, 0] / 1e15) ** -ALPHA
    losses[4] *= 1.2
    law = fit_law(sizes, losses)
    assert law.floor.value == pytest.approx(FLOOR, rel=0.02)
    assert law.exponent().value == pytest.approx(ALPHA, rel=0.1)


def test_weights_and_ids_have_laws_of_their_own():
    weights, ids = (each.ravel() for each in np.meshgrid([1e6, 4e6, 16e6], [1e8, 1e9, 1e10]))
    losses = 1.7 + 2 * (weights / 1e6) ** -0.35 + 1.5 * (ids / 1e8) ** -0.25
    noise = np.random.default_rng(0).standard_normal(9)
    law = fit_law(np.stack([weights, ids], 1), losses * np.exp(0.001 * noise))
    for estimate, planted in ((law.floor, 1.7), (law.exponent(0), 0.35), (law.exponent(1), 0.25)):
        assert estimate.low <= planted <= estimate.high
        assert estimate.value == pytest.approx(planted, rel=0.2)
    with pytest.raises(UserError, match="do not differ enough"):
        fit_law(np.stack([weights, 100 * weights], 1), losses)


def test_too_few_runs_are_refused_in_one_line(make_runs, tmp_path):
    out = tmp_path / "page.html"
    for folders, words in (
        (make_runs(count=3), "give at least 4"),
        (make_runs(seed=1, finished=False), "0 of 8 runs are finished"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            scaling_command(folders, out=out)
        assert "\n" not in str(caught.value)
    folders = make_runs(seed=2)
    (tmp_path / "run-2-1" / "evaluations.jsonl").unlink()
    with pytest.raises(UserError, match=r"no evaluations\.jsonl; train with evaluate\.every"):
        scaling_command(folders, out=out)
    with pytest.raises(UserError, match="--flops"):
        scaling_command(make_runs(seed=3), out=out, flops=-1.0)
    assert not out.exists()
