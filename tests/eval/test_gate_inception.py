"""torch-fidelity's distances: its formulas, its network with given weights, and no pickles."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.eval.gate_inception import SAFE, WIDTH, Inception
from mmpt.eval.gate_metrics import FrechetFeatures, KernelFeatures, Pictures
from mmpt.eval.gate_samples import Answer, Prompt, System
from mmpt.eval.gate_stats import FrechetDistance, Margin, value
from mmpt.parts import Image
from mmpt.processor import Processor

metric_fid = pytest.importorskip("torch_fidelity.metric_fid")


def fid(x: np.ndarray, y: np.ndarray) -> float:
    both = (metric_fid.fid_features_to_statistics(torch.from_numpy(each)) for each in (x, y))
    return metric_fid.fid_statistics_to_metric(*both, False)[metric_fid.KEY_METRIC_FID]


def test_the_frechet_distance_is_that_of_torch_fidelity_and_can_be_drawn_again():
    rng = np.random.default_rng(0)
    real, places = rng.normal(size=(30, 8)), np.repeat(np.arange(30), 2)
    samples = 0.7 * real[places] + rng.normal(0.3, 1.0, (60, 8))
    ours = FrechetDistance(samples, real, places)
    assert value(ours) == pytest.approx(fid(samples, real), rel=1e-9)
    assert value(FrechetDistance(real, real, np.arange(30))) == pytest.approx(0, abs=1e-9)
    times = rng.multinomial(30, [1 / 30] * 30, size=3)
    for found, row in zip(ours.redraw(times), times, strict=True):
        drawn = fid(samples.repeat(row[places], axis=0), real.repeat(row, axis=0))
        assert found == pytest.approx(drawn, rel=1e-9)
    few = FrechetDistance(samples[:12], real[:6], places[:12])  # fewer than features
    assert value(few) == pytest.approx(fid(samples[:12], real[:6]), rel=1e-5)


class Means:
    """An eye of six features."""

    def features(self, pictures) -> np.ndarray:
        return np.stack([np.r_[p.mean((0, 1)), p.std((0, 1))] for p in pictures]) / 50


def test_distances_in_features_are_those_of_torch_fidelity(processor: Processor):
    from torch_fidelity.metric_kid import kernel_poly, mmd2

    def system(low: int) -> System:
        rng = np.random.default_rng(low)
        made = [rng.integers(low, 255, (8, 8, 3)).astype(np.uint8) for _ in range(9)]
        answers = [Answer(Prompt(str(n), ("a",), [], []), [], n) for n in range(len(made))]
        system = System("s", answers, processor)
        system.parts = [Image(pixels) for pixels in made]
        return system

    ours, real, pictures = system(0), system(40), Pictures(eye=Means(), unit=False)
    x, y = pictures.features(ours), pictures.features(real)
    margin, common = Margin(size=0.1), {"pictures": pictures, "real": real}
    frechet = FrechetFeatures(margin=margin, **common).measure(ours)
    assert value(frechet) == pytest.approx(fid(x, y))
    kernels = [kernel_poly(*pair) for pair in ((x, x), (x, y), (y, y))]
    kid = KernelFeatures(margin=margin, scale=1 / 6, **common).measure(ours)
    assert value(kid) == pytest.approx(mmd2(*kernels, mmd_est="u-statistic"))
    assert value(KernelFeatures(margin=margin, **common).measure(ours)) > value(kid)


def test_the_network_has_the_given_weights(inception_weights: Path):
    eye = Inception(inception_weights)
    assert SAFE not in os.environ
    kept = torch.load(inception_weights, weights_only=True)
    assert torch.equal(eye._net.fc.bias, kept["fc.bias"].float())
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (16, 16, 3)).astype(np.uint8) for _ in range(2)]
    pictures.append(pictures[1].repeat(2, 0))
    found = eye.features(pictures)
    assert (found.shape, found.dtype) == ((3, WIDTH), np.float64)
    np.testing.assert_allclose(found[:2], eye.features(pictures[:2]), rtol=1e-3, atol=1e-6)
    assert abs(found[0] - found[1]).max() > 1e-4


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_that_are_anything_else_are_refused_unread(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("mmpt.eval.gate_inception.LARGEST", 1 << 20)
    torch.save({"fc.bias": Evil(str(tmp_path / "made"))}, tmp_path / "evil.pth")
    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "other.pth")
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("archive/data/0", bytes(2 << 20))
    (tmp_path / "short.pth").write_bytes(b"\x80\x02}q")
    for name in ("evil", "other", "bomb", "short", "absent"):
        with pytest.raises(UserError, match=rf"{name}\.pth[^\n]*$") as caught:
            Inception(tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()
    assert SAFE not in os.environ
