"""A model and a run so small that a step takes milliseconds."""

import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmpt.data.loader import DataConfig, SourceConfig
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.train.loop import Trainer
from mmpt.train.loss import NextToken
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


class Poisoned(NextToken):
    """The next-id objective, not finite at some calls."""

    def __init__(self, bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def losses(self, model, batch):
        self.calls += 1
        losses = super().losses(model, batch)
        if self.calls in self.bad:
            losses.total = losses.total * float("nan")
        return losses


@pytest.fixture
def poisoned(vocabulary):
    """A run whose loss is NaN at some of its batches, counted from when it was opened."""

    def open_run(recipe, folder, *, bad):
        return Trainer(
            recipe,
            folder,
            build=lambda: Decoder.from_config(recipe.model, seed=recipe.seed),
            vocabulary=vocabulary,
            objective=Poisoned(bad),
        )

    return open_run


@pytest.fixture
def limit_files():
    """Sets the largest size of a file, None for none: larger writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, handler)
