"""Every layout of ranks gives what one process gives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mmpt.config import UserError, to_toml
from mmpt.data.loader import DataConfig, SourceConfig
from mmpt.data.tokens import EncodedDocument, ShardWriter
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.stream import Segment
from mmpt.train.optim import OptimConfig
from mmpt.train.parallel import ParallelConfig, Ranks, clip_gradients
from mmpt.train.recipe import TrainRecipe, fit_model
from mmpt.vocab import Modality, Vocabulary

REPOSITORY = Path(__file__).parents[2]
LAYOUTS = {
    1: {"one": {}, "full": {"recompute": "full"}, "selective": {"recompute": "selective"}},
    2: {
        "fsdp": {},
        "gathered": {"reshard": False, "recompute": "full"},
        "replicas": {"replicate": 2},
        "expert": {"expert": 2},
        "tensor": {"tensor": 2},
    },
    4: {
        "fsdp": {},
        "hsdp": {"replicate": 2},
        "expert": {"expert": 2, "recompute": "selective"},
        "expert-replicas": {"expert": 2, "replicate": 2},
        "expert-tensor": {"expert": 2, "tensor": 2},
        "tensor": {"tensor": 2},
    },
}
# of the difference of losses: pretraining by two optimisers, denoising, and both in one step
LIMITS = {"sgd": 1e-6, "adamw": 1e-5, "denoise": 1e-6, "joint": 1e-6}
PLAIN = ("one", "fsdp", "expert")  # the others are made of the same: one objective is enough
CASES = [
    (name, count, kind)
    for count, layouts in LAYOUTS.items()
    for name in layouts
    for kind in LIMITS
    if name in PLAIN or kind == "sgd" or (name, count) == ("tensor", 2)
]


def one_medium_each(number: int) -> list[EncodedDocument]:
    """Documents of one medium, half of them text: many rows lack most media."""
    rng = np.random.default_rng(0)
    segments = [
        lambda: Segment(Modality.TEXT, rng.integers(0, 300, rng.integers(5, 60))),
        lambda: Segment(Modality.IMAGE, rng.integers(0, 64, (4, 5))),
        lambda: Segment(Modality.TEXT, rng.integers(0, 300, rng.integers(5, 60))),
        lambda: Segment(Modality.SPEECH, rng.integers(0, 512, rng.integers(3, 40))),
    ]
    return [
        EncodedDocument(f"{index}", f"{index}", "fixed", [segments[index % 4]()])
        for index in range(number)
    ]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    """A small model and rows of one medium each, as a file."""
    folder = tmp_path_factory.mktemp("ranks")
    vocabulary = Vocabulary.build(
        num_text=300,
        text_fingerprint="text-1",
        codebooks=[
            ("visual", 64, {"image": "image-1", "video": "video-1"}, None),
            ("speech", 512, {"speech": "speech-1"}, None),
        ],
    )
    vocabulary.save(folder / "vocabulary.json")
    with ShardWriter(folder / "a.tokens.tar", vocabulary) as writer:
        for document in one_medium_each(64):
            writer.add(document)
        writer.finish()
    groups = {
        "text": GroupConfig(
            modalities=("text",), num_experts=4, num_active=2, router="token_choice"
        ),
        "visual": GroupConfig(modalities=("image", "video"), num_experts=2, router="token_choice"),
        "speech": GroupConfig(modalities=("speech",)),
    }
    model = ModelConfig(
        vocab_size=1,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        expert_hidden=24,
        groups=groups,
    )
    recipe = TrainRecipe(
        vocabulary=str(folder / "vocabulary.json"),
        data=DataConfig(
            sources={"a": SourceConfig(shards=(str(folder / "a.tokens.tar"),))},
            rows=8,
            streams=4,
            length=80,
            packing="none",
        ),
        steps=10,
        accumulate=2,
        model=fit_model(model, vocabulary),
        optim=OptimConfig(lr=1e-2, warmup=2),
        loss_weights={"speech": 3.0},
        z_loss=1e-3,
        checkpoint_every=3,
        seed=3,
    )
    (folder / "recipe.toml").write_text(to_toml(recipe))
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def golden(recipe_file, run_script):
    """What 1, 2 and 4 ranks gave: (layout, ranks, optimiser) -> the results of the ranks."""
    folder = recipe_file.parent
    cases = [(name, LAYOUTS[count][name], count, kind) for name, count, kind in CASES]
    (folder / "cases.json").write_text(json.dumps(cases))
    run_script("golden.py", recipe_file, folder, folder / "cases.json")
    return {
        (name, count, kind): [
            torch.load(folder / f"{name}-{count}-{kind}-{rank}.pt", weights_only=True)
            for rank in range(count)
        ]
        for name, count, kind in CASES
    }


@pytest.mark.parametrize(("name", "count", "kind"), CASES)
def test_gradients_and_losses_are_those_of_one_process(golden, name, count, kind):
    [one] = golden["one", 1, kind]
    for rank in golden[name, count, kind]:
        assert rank["gradients"].keys() == one["gradients"].keys()
        apart = {
            weight: (rank["gradients"][weight] - gradient).norm()
            for weight, gradient in one["gradients"].items()
        }
        whole = torch.stack([gradient.norm() for gradient in one["gradients"].values()]).norm()
        assert torch.stack(list(apart.values())).norm() <= 1e-6 * whole
        for weight, difference in apart.items():  # sums that nearly cancel lose digits
            assert difference <= 5e-6 * one["gradients"][weight].norm(), weight
        for ours, theirs in zip(rank["losses"], one["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=LIMITS[kind])
        assert rank["norms"] == pytest.approx(one["norms"], rel=1e-5)
        for told in ("load", "share", "flops"):
            assert rank[told] == one[told]
        for group, layers in one["router"].items():
            for told, values in layers.items():
                assert rank["router"][group][told] == pytest.approx(values, abs=2e-4)


def test_media_are_absent_on_some_ranks(golden):
    ranks = golden["fsdp", 4, "sgd"]
    assert len({tuple(rank["media"][0]) for rank in ranks}) > 1
    everything = set().union(*(rank["media"][0] for rank in ranks))
    assert any(set(rank["media"][0]) < everything for rank in ranks)


def test_killed_ranks_go_on_and_experts_survive_other_ranks(recipe_file, run_script, tmp_path):
    done = run_script("kill_and_resume.py", recipe_file, tmp_path, "--points", "3")
    assert done.stdout.count("point") == 3
    assert "4 -> 1 -> 2 ranks" in done.stdout


def test_clipping_bounds_the_norm_and_reports_it(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = clip_gradients(model.parameters(), 0.5)
    assert norm == pytest.approx(model.num_parameters**0.5, rel=1e-4)
    assert clip_gradients(model.parameters(), 0.0) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"expert": 3}, "does not divide the 2 experts"),
        ({"tensor": 4}, r"does not divide model\.num_kv_heads"),
        ({"replicate": 5}, "12 processes are no multiple"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_in_one_line(config, sides, message):
    with pytest.raises(UserError, match=message) as error:
        ParallelConfig(**sides).check(config, 12)
    assert "\n" not in str(error.value)


def test_one_process_is_no_group():
    with Ranks(ParallelConfig(), "cpu") as ranks:
        assert (ranks.rank, ranks.count, ranks.mesh) == (0, 1, None)
    with pytest.raises(UserError, match="1 processes are no multiple"):
        Ranks(ParallelConfig(tensor=2), "cpu")


def test_torchrun_starts_killed_ranks_again(recipe_file, tmp_path):
    run, log = tmp_path / "run", (tmp_path / "log").open("w")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node=2", "--max-restarts=3", "-m", "mmpt"),
        *("train", recipe_file, "checkpoint_every=2", "steps=30", "--out", run),
    ]
    launcher = subprocess.Popen(
        command,
        stderr=log,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    try:
        checkpoints = run / "checkpoints"
        wait_for(lambda: any(checkpoints.glob("step-*[0-9]")) or launcher.poll() is not None)
        worker = children_of(launcher.pid)[-1]
        os.kill(worker, signal.SIGKILL)
        assert launcher.wait(timeout=100) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        launcher.kill()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))
    assert "exitcode: -9" in (tmp_path / "log").read_text()


def children_of(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(happened, seconds=60.0):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
