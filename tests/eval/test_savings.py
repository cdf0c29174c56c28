"""`mmpt savings` as a whole: runs of a few steps, resumed ones, and recipes that are refused."""

import json
import signal
from pathlib import Path

import pytest

from mmpt.__main__ import main
from mmpt.config import UserError, load_recipe
from mmpt.data.shards import is_heldout
from mmpt.eval.config import EvaluateConfig
from mmpt.eval.savings import SavingsRecipe, savings_command
from mmpt.eval.savings_jobs import plan_jobs
from mmpt.eval.savings_variants import VARIANTS
from mmpt.train.pretrain import train
from mmpt.train.recipe import load_run_recipe

RECIPE = """
vocabulary = "{folder}/vocabulary.json"
steps = 4
[model]
width = 16
num_layers = 1
num_heads = 2
num_kv_heads = 1
expert_hidden = 24
[optim]
lr = 1e-2
warmup = 1
schedule = "constant"
[data]
rows = 2
length = 64
buffer = 8
sources.docs.shards = ["{folder}/docs-train-*.tokens.tar"]
[evaluate]
every = 1
growth = 0.6
documents = 2
candidates = 0
[variants]
small = ["like=4t2v2s", "expert_hidden=8"]
"""


@pytest.fixture
def recipe(tmp_path, vocabulary, make_documents, write_shard):
    """Steps of milliseconds."""
    documents = make_documents(150)
    for side in (False, True):
        name = "docs-heldout-0000" if side else "docs-train-0000"
        found = [d for d in documents if is_heldout(d.base) == side]
        write_shard(tmp_path / "tokens" / f"{name}.tokens.tar", found)
    vocabulary.save(tmp_path / "tokens" / "vocabulary.json")
    path = tmp_path / "savings.toml"
    path.write_text(RECIPE.format(folder=tmp_path / "tokens"))
    return path


def timeless(found):
    """What a result says but for time and place."""
    for each in found["runs"]:
        del each["seconds"]
    for each in found["savings"].values():
        del each["seconds"]
    return {key: found[key] for key in ("runs", "savings", "finished")}


def test_two_variants_with_two_seeds_from_the_command_line(tmp_path, recipe, capsys, read_page):
    out = tmp_path / "out"
    arguments = [str(recipe), "--out", str(out), "--variants", "dense,1t1v1s", "--seeds", "2"]
    assert main(["savings", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finished"]
    assert [row["run"] for row in found["runs"]] == ["dense-0", "dense-1", "1t1v1s-0", "1t1v1s-1"]
    assert [row["steps"] for row in found["runs"]] == [8, 8, 4, 4]
    saved = found["savings"]["1t1v1s"]
    # their rows are not all equally full
    assert found["step_of_a_dense_one"]["1t1v1s"]["flops"] == pytest.approx(1.0, rel=0.1)
    assert saved["flops"].keys() == saved["seconds"].keys() >= {"all", "text", "image", "speech"}
    for each in found["runs"]:
        rows = (out / each["run"] / "metrics.jsonl").read_text().splitlines()
        assert each["flops"] == pytest.approx(sum(json.loads(rows[-1])["flops"].values()), rel=1e-5)
        evaluated = (out / each["run"] / "evaluations.jsonl").read_text().splitlines()
        last = [5, 7, 8] if each["run"].startswith("dense") else [4]
        assert [json.loads(line)["step"] for line in evaluated] == [1, 2, 3, *last]
        assert json.loads(evaluated[0])["choices"] == {}
        # equal data order
        other = (out / f"dense-{each['run'][-1]}" / "metrics.jsonl").read_text().splitlines()
        for line, dense in zip(rows, other, strict=False):
            assert json.loads(line)["tokens"] == json.loads(dense)["tokens"]
    assert 0 < found["times that a source was read"]["docs"] < 2
    page = read_page((out / "savings.html").read_text())
    assert page.asks_nothing()
    assert f"mmpt savings {recipe} --out {out}" in page.text
    assert json.loads((out / "savings.json").read_text())["savings"] == found["savings"]


def test_a_command_that_was_killed_goes_on_to_the_same_end(tmp_path, recipe):
    options = {"variants": "small", "seeds": 1}
    whole = savings_command(recipe, out=tmp_path / "whole", **options)

    def stop(metrics):
        if metrics["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    resolved, vocabulary = load_run_recipe(SavingsRecipe, recipe)
    jobs = plan_jobs(resolved, ["dense", "small"], resolved.variants, tmp_path / "killed", 1)
    for job, hook in zip(jobs, (None, stop), strict=True):
        [stage] = job.stages
        train(stage.recipe, stage.folder, vocabulary=vocabulary, on_step=hook, progress=False)
    before = (jobs[0].folder / "metrics.jsonl").read_bytes()
    resumed = savings_command(recipe, out=tmp_path / "killed", **options)
    assert timeless(resumed) == timeless(whole)
    assert (jobs[0].folder / "metrics.jsonl").read_bytes() == before  # it was done
    with pytest.raises(UserError, match="was begun with"):
        savings_command(recipe, ["optim.lr=1e-3"], out=tmp_path / "killed", **options)


def test_what_inference_cannot_route_has_a_gap_and_auxiliary_routers(tmp_path, recipe):
    out = tmp_path / "out"
    found = savings_command(recipe, out=out, variants="moma", seeds=1)
    moma, dense = (next(r for r in found["runs"] if name in r["run"]) for name in ("moma", "dense"))
    assert moma["steps"] == 4 + 1  # those of the routers count
    assert moma["flops"] > 4 * dense["flops"] / 8
    first, second = (out / name / "evaluations.jsonl" for name in ("moma-0", "moma-0-routers"))
    assert not first.exists()
    last = json.loads(second.read_text().splitlines()[-1])["loss"]
    assert all(moma["nats"][medium] == each["nats"] for medium, each in last.items())
    gap = found["causality_gap"]["moma"]
    assert all(abs(nats) > 1e-5 for nats in gap.values())
    assert found["causality_gap"].keys() == {"moma"}
    again = savings_command(recipe, out=out, variants="moma", seeds=1)
    assert timeless(again) == timeless(found)
    assert again["causality_gap"] == found["causality_gap"]


def test_equal_variants_save_nothing_on_equal_rows(tmp_path, recipe):
    found = savings_command(
        recipe, ["steps=3"], out=tmp_path / "out", variants="", variant=["twin:like=dense"], seeds=1
    )
    dense, twin = (tmp_path / "out" / name / "evaluations.jsonl" for name in ("dense-0", "twin-0"))
    lines = [dense.read_text().splitlines(), twin.read_text().splitlines()]
    losses = [[json.loads(line)["loss"] for line in each[:3]] for each in lines]
    assert losses[0] == losses[1]
    saved = found["savings"]["twin"]["flops"]
    assert saved["all"] == {"eta": 1.0, "low": None, "high": None, "bound": ""}


def test_a_source_is_never_read_more_than_twice(tmp_path, recipe):
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"'docs' would be read \d+\.\d+ times in the 400"
    ) as caught:
        savings_command(recipe, ["steps=200"], out=out, variants="dense", seeds=1)
    assert "\n" not in str(caught.value)
    more = ["steps=200", "data.sources.docs.max_epochs=2.0"]
    with pytest.raises(UserError, match="sources end after"):
        savings_command(recipe, more, out=out, variants="dense", seeds=1)
    assert not out.exists()


def test_runs_that_cannot_be_compared_are_refused(tmp_path, recipe):
    stage = "[{start = 0.5, weights = {docs = 2.0}}]"
    for change, words in (
        ("optim.schedule=wsd", "optim.schedule=constant"),
        (f"data.schedule={stage}", "data.schedule"),
        ("evaluate.every=0", "evaluate.every is missing"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            savings_command(recipe, [change], out=tmp_path / "out")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no variant '5t'"):
        savings_command(recipe, out=tmp_path / "out", variants="5t")
    with pytest.raises(UserError, match="--seeds 0"):
        savings_command(recipe, out=tmp_path / "out", variants="dense", seeds=0)


def test_evaluations_are_log_spaced():
    config = EvaluateConfig(every=10, growth=0.5)
    assert [n for n in range(1, 100) if config.is_due(n)] == [10, 15, 23, 34, 51, 76]
    assert [n for n in range(1, 30) if EvaluateConfig(every=10).is_due(n)] == [10, 20]
    assert not any(EvaluateConfig().is_due(n) for n in range(1, 30))


def test_the_shipped_recipe_is_one(tmp_path):
    path = Path(__file__).parents[2] / "examples/recipes/savings.toml"
    recipe = load_recipe(SavingsRecipe, path, ["model.vocab_size=100"])
    names = list(VARIANTS)
    jobs = plan_jobs(recipe, [*names, *recipe.variants], recipe.variants, tmp_path, 3)
    assert [job.variant for job in jobs[:2]] == ["dense", "shared-8"]
    assert len(jobs) == 3 * 7
    first = {(job.variant, job.stages[0].recipe.seed): job.stages[0].recipe.steps for job in jobs}
    assert first["dense", 2] == 2 * recipe.steps
    assert first["moma", 0] == first["wide-text", 1] == recipe.steps
