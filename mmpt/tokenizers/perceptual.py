"""Distances in the feature space of a frozen network: a random one, or LPIPS from a user's file.

Legend: B batch, C channels, H W pixels.
"""

import math
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpt.config import UserError

# torchvision's vgg16: the places of its convolutions in `features`; the last of each row is seen
VGG16 = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


class RandomFeatures(nn.Module):
    """A frozen random convolutional pyramid: the structure alone, without training, already makes a
    perceptual distance (arXiv 2103.10571).

    The weights are a function of the seed, so that the recipe is enough to redo them.
    """

    def __init__(self, seed: int, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        pairs = zip((3, *widths), widths, strict=False)
        self.stages = nn.ModuleList(_random_convolution(*pair, generator) for pair in pairs)
        self.requires_grad_(False)

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        """1 - cosine of features, averaged over places and scales: half the squared distance of
        unit features, in [0, 2].

        made, real: float (B, 3, H, W) in [-1, 1].
        """
        with torch.no_grad():
            wanted = self._features(real)
        pairs = zip(self._features(made), wanted, strict=True)
        cosines = [_cosine(a, b) for a, b in pairs]
        return 1 - torch.stack(cosines).mean()

    def _features(self, pixels: Tensor) -> list[Tensor]:
        features, x = [], pixels
        for index, stage in enumerate(self.stages):
            if index:
                x = _halve(x)
            x = F.leaky_relu(stage(x), 0.1)  # never all zero, which has no direction
            features.append(x)
        return features


class Lpips(nn.Module):
    """LPIPS with a VGG16 (arXiv 1801.03924, eq. 1), from weights that the user has.

    path: one safetensors file with the convolutions of torchvision's `vgg16` under their own names
    (`features.0.weight`, `features.0.bias`, ...) and the heads of the `lpips` package under theirs
    (`lin0.model.1.weight` to `lin4.model.1.weight`). Raises UserError when it is anything else.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        tensors = _read(path)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.blocks, self.heads = nn.ModuleList(), nn.ParameterList()
        try:
            for index, places in enumerate(VGG16):
                self.blocks.append(nn.ModuleList(_convolution(tensors, i) for i in places))
                num_channels = len(tensors[f"features.{places[-1]}.bias"])
                head = tensors[f"lin{index}.model.1.weight"].float()
                self.heads.append(nn.Parameter(head.view(1, num_channels, 1, 1)))
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"loss.lpips = {str(path)!r} is no VGG16 with heads of LPIPS ({error}); it needs "
                "features.N.weight and features.N.bias of torchvision's vgg16 and "
                "linN.model.1.weight of the lpips package"
            ) from None
        self.requires_grad_(False)

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        """The mean distance of pictures float (B, 3, H, W) in [-1, 1], sides of at least 16."""
        with torch.no_grad():
            wanted = self._features(real)
        distance = made.new_zeros((), dtype=torch.float32)
        for head, a, b in zip(self.heads, self._features(made), wanted, strict=True):
            distance = distance + (head * _squared(a, b)).sum(1).mean()
        return distance

    def _features(self, pixels: Tensor) -> list[Tensor]:
        x, features = (pixels - self.shift) / self.scale, []
        for index, block in enumerate(self.blocks):
            if index:
                x = F.max_pool2d(x, 2)
            for convolution in block:  # type: ignore[attr-defined] # a list of convolutions
                x = F.relu(convolution(x))
            features.append(x)
        return features


@torch.no_grad()
def _random_convolution(before: int, after: int, generator: torch.Generator) -> nn.Conv2d:
    convolution = nn.Conv2d(before, after, 3, padding=1)
    shape = (after, before, 3, 3)
    # keeps the variance through the nonlinearity
    convolution.weight.copy_(torch.randn(shape, generator=generator) * math.sqrt(2 / (9 * before)))
    # without a bias the normalised features could not tell bright from dark
    assert convolution.bias is not None
    convolution.bias.copy_(torch.randn(after, generator=generator) * 0.5)
    return convolution


def _read(path: str | Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"loss.lpips = {str(path)!r} cannot be read as safetensors ({error}); convert it"
        ) from None


def _convolution(tensors: dict[str, Tensor], place: int) -> nn.Conv2d:
    weight = tensors[f"features.{place}.weight"].float()
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
    convolution.load_state_dict(
        {"weight": weight, "bias": tensors[f"features.{place}.bias"].float()}
    )
    return convolution


def _squared(made: Tensor, real: Tensor) -> Tensor:
    """Squared difference of features (B, C, H, W) that have length 1 at each place, in fp32."""
    made, real = (x.float() / (x.float().norm(dim=1, keepdim=True) + 1e-8) for x in (made, real))
    return (made - real).square()


def _halve(x: Tensor) -> Tensor:
    """Blur with 1 2 1, then take every second place: a plain stride would alias (1904.11486)."""
    side = torch.tensor([0.25, 0.5, 0.25], device=x.device, dtype=x.dtype)
    # a depthwise convolution is many times faster here than an average pooling
    return F.conv2d(
        x, torch.outer(side, side).expand(len(x[0]), 1, 3, 3), stride=2, groups=len(x[0])
    )


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """The mean cosine of two fields of vectors (B, C, H, W); plain sums are the fastest way."""
    a, b = a.float(), b.float()
    lengths = (a * a).sum(1) * (b * b).sum(1)
    return ((a * b).sum(1) * torch.rsqrt(lengths + 1e-12)).mean()
