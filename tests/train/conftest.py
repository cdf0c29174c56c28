"""A model and a run so small that a step takes milliseconds."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmpt.data.loader import DataConfig, SourceConfig
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.train.optim import OptimConfig
from mmpt.train.recipe import TrainRecipe, fit_model


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Threads that wait for each other make tiny tensors slow where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_script():
    """Runs a script of this folder to its end; it forks ranks of its own."""

    def run(name, *arguments, check=True):
        here = Path(__file__).parent
        done = subprocess.run(
            [sys.executable, here / name, *arguments],
            env=os.environ | {"PYTHONPATH": str(here.parents[1])},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture
def config(vocabulary):
    """A model of two layers."""
    small = ModelConfig(
        vocab_size=1, width=16, num_layers=2, num_heads=2, num_kv_heads=1, expert_hidden=24
    )
    return fit_model(small, vocabulary)


@pytest.fixture
def model(config):
    return Decoder.from_config(config, seed=0)


@pytest.fixture
def recipe(tmp_path, config, make_documents, write_shard):
    """Ten steps on sixty documents."""
    write_shard(tmp_path / "a.tokens.tar", make_documents(60))
    source = SourceConfig(shards=(str(tmp_path / "a.tokens.tar"),))
    return TrainRecipe(
        data=DataConfig(sources={"a": source}, rows=2, length=64, buffer=8),
        steps=10,
        model=config,
        optim=OptimConfig(lr=1e-2, warmup=2),
        checkpoint_every=4,
        seed=3,
    )


@pytest.fixture
def another(recipe):
    """The recipe with other values."""
    return lambda **changes: replace(recipe, **changes)


@pytest.fixture
def tensors_equal():
    def equal(one, other):
        return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)

    return equal
