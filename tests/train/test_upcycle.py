"""A trained run grows experts, and goes on with its optimiser and its data."""

import json
from dataclasses import replace

import pytest
import torch

from mmpt.__main__ import main
from mmpt.config import UserError
from mmpt.data.loader import merge_states
from mmpt.model.config import GroupConfig
from mmpt.model.transformer import Decoder
from mmpt.model.weights import read_tensors
from mmpt.processor import ProcessorSettings
from mmpt.train.checkpoint import latest
from mmpt.train.export import export
from mmpt.train.pretrain import train, train_command
from mmpt.train.upcycle import upcycle_command

BANK = "layers.1.experts.groups.text.bank.down"
EXPERTS = "text=3,visual=2"


@pytest.fixture
def seed(tmp_path, another, config, vocabulary):
    """A finished run of one expert per group, with averaged weights; its recipe can be read."""
    vocabulary.save(tmp_path / "vocabulary.json")
    groups = {
        name: GroupConfig(modalities=group.modalities) for name, group in config.groups.items()
    }
    recipe = another(
        model=replace(config, groups=groups),
        vocabulary=str(tmp_path / "vocabulary.json"),
        ema=0.9,
        steps=4,
    )
    train(recipe, tmp_path / "seed", vocabulary=vocabulary, progress=False)
    return tmp_path / "seed"


def newest(run):
    return latest(run / "checkpoints")


def logits(folder):
    ids = torch.arange(60)[None] * 7
    with torch.no_grad():
        model = Decoder.load(folder).eval()
        return model.logits(model(ids, modality=(ids > 300).long()))


def loader(folder):
    return merge_states([json.loads(p.read_text()) for p in sorted(folder.glob("loader-*.json"))])


@pytest.mark.parametrize(("schedule", "step"), [("reset", 0), ("keep", 4)])
def test_an_upcycled_run_keeps_its_function_moments_and_data(tmp_path, seed, schedule, step):
    out = tmp_path / "grown"
    told = upcycle_command(seed, experts=EXPERTS, out=out, schedule=schedule)
    assert told["groups"] == {"text": 3, "visual": 2, "speech": 1}
    assert (logits(newest(seed)) - logits(newest(out))).abs().max() < 1e-6
    assert newest(out).name == f"step-{step:08d}"
    assert loader(newest(out)) == loader(newest(seed))
    counters = [json.loads((newest(r) / "state.json").read_text())["state"] for r in (seed, out)]
    assert counters[1]["counters"] == counters[0]["counters"] | {"step": step}
    for name in ("optimizer", "average"):
        before, after = (read_tensors(newest(run), name) for run in (seed, out))
        for key, tensor in before.items():
            grown = tensor.expand(after[key].shape) if tensor.ndim else tensor
            assert torch.equal(after[key], grown)
        # only the routers are new, and an optimiser has not met them
        new = after.keys() - before.keys()
        assert {key.rpartition(".")[2] for key in new} == (
            {"router"} if name == "average" else set()
        )


@pytest.mark.parametrize("schedule", ["reset", "keep"])
def test_training_goes_on_from_an_upcycled_run(tmp_path, seed, schedule):
    out = tmp_path / "grown"
    options = ["--experts", EXPERTS, "--out", str(out), "--schedule", schedule]
    assert main(["upcycle", str(seed), "steps=8", *options]) == 0
    begun = Decoder.load(newest(out)).state_dict()
    told = train_command(out / "recipe.toml", out=out)
    assert told["finished"]
    assert (told["step"], told["bad_steps"]) == (8, 0)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == (8 if schedule == "reset" else 4)
    ended = Decoder.load(newest(out)).state_dict()
    router = BANK.replace("bank.down", "router")
    assert not torch.equal(begun[router], ended[router])
    assert torch.equal(begun[BANK][0], begun[BANK][1])
    assert not torch.equal(ended[BANK][0], ended[BANK][1])  # they learn apart
    assert read_tensors(newest(out), "optimizer")[f"{router}:exp_avg"].any()
    loads = torch.tensor([line["load"]["text"] for line in lines])
    assert ((loads > 0).any(0).sum(1) > 1).all()  # in every layer


def test_a_model_folder_is_upcycled_to_another(tmp_path, seed, vocabulary):
    export(seed, out=tmp_path / "model")
    ProcessorSettings(("text-2k",), 32).save(tmp_path / "model")
    upcycle_command(tmp_path / "model", experts="speech=2", out=tmp_path / "grown", active=2)
    grown = Decoder.load(tmp_path / "grown", vocabulary=vocabulary)
    assert grown.config.groups["speech"].num_active == 2
    assert (logits(tmp_path / "model") - logits(tmp_path / "grown")).abs().max() < 1e-6
    assert ProcessorSettings.load(tmp_path / "grown") == ProcessorSettings(("text-2k",), 32)


def test_what_cannot_be_upcycled_is_one_line(tmp_path, seed):
    export(seed, out=tmp_path / "model")
    new = {"experts": "text=2", "out": tmp_path / "new"}
    for act, message in (
        (lambda: upcycle_command(tmp_path / "none", **new), "no model at"),
        (lambda: upcycle_command(seed, **new | {"out": seed}), "is not empty"),
        (lambda: upcycle_command(seed, **new | {"experts": "text"}), "use each group once"),
        (
            lambda: upcycle_command(seed, **new | {"experts": "text=2,text=3"}),
            "use each group once",
        ),
        (lambda: upcycle_command(seed, ["model.width=32"], **new), "leave out model"),
        (lambda: upcycle_command(seed, ["stepz=3"], **new), "unknown key 'stepz'"),
        (lambda: upcycle_command(tmp_path / "model", ["steps=3"], **new), "steps=3 could change"),
    ):
        with pytest.raises(UserError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
        assert not (tmp_path / "new").exists()
