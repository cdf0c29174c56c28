"""A patch discriminator for the last part of a training: what it cannot tell apart looks real.

PatchGAN (arXiv 1611.07004) with the hinge loss and a constant weight, kept calm by LeCam
regularisation (arXiv 2104.03310, eq. 3 and 4), which pulls its answers towards running means of its
answers to the other kind.

Legend: B batch, C channels, H W pixels, h w patches.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpt.tokenizers.losses import LossConfig
from mmpt.tokenizers.processes import Processes


class Discriminator(nn.Module):
    """pixels (B, C, H, W) -> one answer for each patch (B, 1, h, w): above 0 is real.

    Norms are per picture, so that an answer depends on no other picture and on no other process.
    """

    def __init__(self, num_channels: int = 3, *, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(num_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            layers.append(nn.Conv2d(before, 2 * before, 4, stride, 1, bias=False))
            layers += [nn.GroupNorm(8, 2 * before), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """The answers, in fp32."""
        return self.layers(pixels).float()


class Adversary(nn.Module):
    """A discriminator, its optimiser and its running means.

    `term` is what the codec adds to its loss; `update` is the discriminator's own step, on the
    pictures that `term` was last called with.
    """

    real_mean: Tensor
    made_mean: Tensor

    def __init__(self, config: LossConfig, num_steps: int, *, num_channels: int = 3) -> None:
        super().__init__()
        self.lecam = config.lecam
        self.first_step = math.ceil(config.discriminator_from * num_steps)
        network = Discriminator(num_channels, width=config.discriminator_width)
        self.network = network.requires_grad_(False)
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("made_mean", torch.zeros(()))
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.discriminator_lr, betas=(0.5, 0.9)
        )
        self._pair: tuple[Tensor, Tensor] | None = None

    def active(self, step: int) -> bool:
        """Whether the discriminator takes part in a step."""
        return step >= self.first_step

    def term(self, made: Tensor, real: Tensor) -> Tensor:
        """The codec's loss -E[D(made)], of float (B, C, H, W)."""
        self._pair = made.detach(), real
        return -self.network(made).mean()

    def update(self, processes: Processes, share: float = 1.0) -> dict[str, float]:
        """One step of the discriminator on the pictures of the last `term`; what to log.

        share: the weight of this process's pictures in the mean over all processes.
        """
        assert self._pair is not None, "update follows term"
        (made, real), self._pair = self._pair, None
        self.network.requires_grad_(True)
        answers = self.network(torch.cat([real, made]))
        for_real, for_made = answers.chunk(2)
        loss = F.relu(1 - for_real).mean() + F.relu(1 + for_made).mean()
        calm = F.relu(for_real - self.made_mean).square().mean()
        calm = calm + F.relu(self.real_mean - for_made).square().mean()
        self.optimizer.zero_grad()
        ((loss + self.lecam * calm) * share).backward()
        processes.average_gradients(list(self.network.parameters()))
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        means = torch.stack([for_real.mean(), for_made.mean(), loss]).detach() * share
        means = processes.average(means)
        if torch.isfinite(norm):
            self.optimizer.step()
            self.real_mean.lerp_(means[0], 0.001)
            self.made_mean.lerp_(means[1], 0.001)
        self.network.requires_grad_(False)
        names = ("real_answer", "made_answer", "discriminator")
        return dict(zip(names, means.tolist(), strict=True))
