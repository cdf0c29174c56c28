"""Losses of pictures: zero for equals, larger for worse, with a gradient that repairs."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from mmpt.config import UserError
from mmpt.tokenizers.discriminator import Adversary, Discriminator
from mmpt.tokenizers.losses import LossConfig, gradient_loss, ssim_loss, ssim_map
from mmpt.tokenizers.objectives.pictures import PictureLoss
from mmpt.tokenizers.perceptual import Lpips, RandomFeatures
from mmpt.tokenizers.processes import Processes

SMALL = [2, 2, "M", 3, 3, "M", 4, 4, 4, "M", 5, 5, 5, "M", 6, 6, 6, "M"]  # a narrow VGG16


def pictures(size: int = 32, *, count: int = 2, seed: int = 0) -> Tensor:
    """Smooth random pictures in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def noisy(real: Tensor, amount: float) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return real + amount * torch.randn(real.shape, generator=generator)


def vgg() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_layers(SMALL)  # type: ignore[arg-type] # torchvision's own form


def save_lpips(path: Path) -> list[Tensor]:
    tensors = {f"features.{name}": value for name, value in vgg().state_dict().items()}
    widths = [2, 3, 4, 5, 6]
    heads = [torch.rand(1, w, 1, 1, generator=torch.Generator().manual_seed(w)) for w in widths]
    tensors |= {f"lin{index}.model.1.weight": head for index, head in enumerate(heads)}
    safetensors.torch.save_file(tensors, path)
    return heads


@pytest.mark.parametrize("term", ["gradient", "ssim", "features", "lpips"])
def test_a_loss_is_zero_for_equals_grows_with_the_damage_and_repairs_it(
    term: str, tmp_path: Path
) -> None:
    save_lpips(tmp_path / "vgg.safetensors")
    loss = {
        "gradient": lambda made, real: gradient_loss(made - real),
        "ssim": ssim_loss,
        "features": RandomFeatures(0),
        "lpips": Lpips(tmp_path / "vgg.safetensors"),
    }[term]
    real = pictures()
    values = [float(loss(noisy(real, amount), real)) for amount in (0.0, 0.05, 0.2, 0.8)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values == sorted(values)
    made = noisy(real, 0.3).requires_grad_()
    before = loss(made, real)
    [slope] = torch.autograd.grad(before, made)
    assert torch.isfinite(slope).all()
    step = 0.02 * slope / slope.norm() * made.numel() ** 0.5
    assert loss(made.detach() - step, real) < before


def test_ssim_equals_its_definition() -> None:
    made, real = noisy(pictures(16), 0.2).double(), pictures(16).double()
    weight = torch.exp(-torch.arange(-3, 4).double().square() / 4.5)
    window = torch.outer(weight, weight) / weight.sum() ** 2
    x, y = made[0, 1, 2:9, 5:12] + 1, real[0, 1, 2:9, 5:12] + 1
    mean_x, mean_y = (window * x).sum(), (window * y).sum()
    var_x = (window * (x - mean_x) ** 2).sum()
    var_y = (window * (y - mean_y) ** 2).sum()
    covariance = (window * (x - mean_x) * (y - mean_y)).sum()
    low, high = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    want = (2 * mean_x * mean_y + low) * (2 * covariance + high)
    want /= (mean_x**2 + mean_y**2 + low) * (var_x + var_y + high)
    assert ssim_map(made, real)[0, 1, 2, 5] == pytest.approx(float(want), abs=1e-9)


def test_ssim_sees_structure_and_takes_the_scales_that_fit() -> None:
    real = pictures(64)
    brighter, blurred = real * 0.9 + 0.1, nn.functional.avg_pool2d(real, 5, 1, 2)
    assert ssim_loss(brighter, real) < ssim_loss(noisy(real, 0.1), real)
    assert ssim_loss(blurred, real) < ssim_loss(-real, real)
    for size in (7, 13, 32, 64, 200):
        assert 0 < float(ssim_loss(noisy(pictures(size), 0.1), pictures(size))) < 1
    # even where one side is flat: the beginning of a training
    flat = torch.zeros_like(real, requires_grad=True)
    [slope] = torch.autograd.grad(ssim_loss(flat, real), flat)
    assert torch.isfinite(slope).all()
    with pytest.raises(UserError, match="SSIM needs sides of 7 pixels"):
        ssim_loss(pictures(6), pictures(6))


def test_ssim_does_not_depend_on_autocast() -> None:
    made, real = noisy(pictures(), 0.2), pictures()
    plain = ssim_loss(made, real)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim_loss(made, real), plain)


def test_random_features_are_a_function_of_the_seed_and_see_brightness() -> None:
    first = RandomFeatures(3)
    torch.rand(1)  # the global randomness does not matter
    again, other = RandomFeatures(3), RandomFeatures(4)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    made, real = noisy(pictures(), 0.2), pictures()
    assert first(made, real) == again(made, real) != other(made, real)
    dark, bright = torch.full_like(real, -0.5), torch.full_like(real, 0.5)
    assert first(dark, bright) > 0.05
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_lpips_equals_its_definition_over_the_layers_of_torchvision(tmp_path: Path) -> None:
    heads = save_lpips(tmp_path / "vgg.safetensors")
    made, real = noisy(pictures(), 0.2), pictures()
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    x, want, index = torch.cat([made, real]) - shift, torch.zeros(2), 0
    x = x / scale
    for place, layer in enumerate(vgg()):
        x = layer(x)
        if place in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            unit = nn.functional.normalize(x, dim=1)
            squared = (unit[:2] - unit[2:]).square() * heads[index]
            want += squared.sum(1).mean((1, 2))
            index += 1
    got = Lpips(tmp_path / "vgg.safetensors")(made, real)
    torch.testing.assert_close(got, want.mean())


def test_a_file_that_holds_no_lpips_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x02}q\x00.")
    save_lpips(tmp_path / "whole.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "whole.safetensors")
    del tensors["lin3.model.1.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "half.safetensors")
    for name, message in (
        ("absent.safetensors", "cannot be read as safetensors"),
        ("pickle.pth", "cannot be read as safetensors"),
        ("half.safetensors", "is no VGG16 with heads of LPIPS"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            PictureLoss(LossConfig(lpips=str(tmp_path / name)))
        assert "\n" not in str(caught.value)


def test_the_default_table_is_squared_error_and_gradient() -> None:
    made, real = noisy(pictures(), 0.2), pictures()
    loss, terms = PictureLoss(LossConfig())(made, real, 0)
    error = made - real
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    assert torch.equal(loss, error.square().mean() + 0.05 * edges)
    assert set(terms) == {"l2", "gradient"}


def test_every_weight_counts(tmp_path: Path) -> None:
    save_lpips(tmp_path / "vgg.safetensors")
    config = LossConfig(
        l1=0.5,
        l2=2.0,
        gradient=0.1,
        ssim=0.3,
        features=0.4,
        lpips=str(tmp_path / "vgg.safetensors"),
        lpips_weight=0.7,
        discriminator=0.2,
        discriminator_from=0.0,
        discriminator_width=8,
    )
    loss = PictureLoss(config, Adversary(config, 10))
    total, terms = loss(noisy(pictures(), 0.2), pictures(), 0)
    weights = {
        "l1": 0.5,
        "l2": 2.0,
        "gradient": 0.1,
        "ssim": 0.3,
        "features": 0.4,
        "lpips": 0.7,
        "adversary": 0.2,
    }
    assert terms.keys() == weights.keys()
    want = sum(weight * terms[name] for name, weight in weights.items())
    assert float(total) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"ssim": -1.0}, r"loss.ssim = -1.0; use a number of at least 0"),
        ({"l2": float("nan")}, "loss.l2 = nan"),
        ({"discriminator_from": 1.5}, "a share of the steps"),
        ({"discriminator_width": 3}, "use a multiple of 4"),
    ],
)
def test_a_weight_that_makes_no_sense_is_refused(setting: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LossConfig(**setting)


def test_a_discriminator_answers_for_patches_of_one_picture_alone() -> None:
    network = Discriminator(width=8)
    assert network(pictures(64)).shape == (2, 1, 6, 6)
    assert network(pictures(32)).shape == (2, 1, 2, 2)
    both, first = network(pictures(32)), network(pictures(32)[:1])
    torch.testing.assert_close(both[:1], first)


def test_an_adversary_learns_to_tell_and_teaches_the_codec() -> None:
    torch.manual_seed(0)
    config = LossConfig(
        discriminator=0.1, discriminator_from=0.5, discriminator_width=8, discriminator_lr=1e-3
    )
    adversary, processes = Adversary(config, 10), Processes("cpu")
    assert [adversary.active(step) for step in (0, 4, 5, 9)] == [False, False, True, True]
    rows = []
    for seed in range(40):
        real = pictures(count=4, seed=seed)
        made = noisy(real, 0.3).requires_grad_()
        adversary.term(made, real).backward()
        assert made.grad is not None
        assert made.grad.any()
        if not seed:  # the codec's loss teaches the codec alone
            assert all(parameter.grad is None for parameter in adversary.parameters())
        rows.append(adversary.update(processes))
    assert rows[-1]["real_answer"] > 0.3 > -0.3 > rows[-1]["made_answer"]
    assert rows[-1]["discriminator"] < rows[0]["discriminator"]
    assert adversary.real_mean > 0 > adversary.made_mean  # what LeCam pulls towards
