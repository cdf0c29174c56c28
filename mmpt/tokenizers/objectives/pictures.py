"""The loss of rebuilt pictures: every term that the recipe's [loss] table gives a weight."""

import torch
from torch import Tensor, nn

from mmpt.tokenizers.discriminator import Adversary
from mmpt.tokenizers.losses import LossConfig, gradient_loss, ssim_loss
from mmpt.tokenizers.perceptual import Lpips, RandomFeatures


class PictureLoss(nn.Module):
    """The weighted sum of the terms; holds the frozen networks that some of them need."""

    def __init__(self, config: LossConfig, adversary: Adversary | None = None) -> None:
        super().__init__()
        self.weights = {
            "gradient": config.gradient,
            "l2": config.l2,
            "l1": config.l1,
            "ssim": config.ssim,
            "features": config.features,
            "lpips": config.lpips_weight if config.lpips else 0.0,
            "adversary": config.discriminator,
        }
        self.features = RandomFeatures(config.features_seed) if config.features else None
        self.lpips = Lpips(config.lpips) if self.weights["lpips"] else None
        self.adversary = adversary

    def forward(self, made: Tensor, real: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss and its terms before they are weighted.

        made, real: float (n, 3, H, W), real in [-1, 1].
        """
        # once for all terms, or half precision would add up their gradients
        terms = self._terms(made.float(), real.float(), step)
        loss = torch.zeros((), device=made.device)
        for name, term in terms.items():
            loss = loss + self.weights[name] * term
        return loss, {name: float(term.detach()) for name, term in terms.items()}

    def _terms(self, made: Tensor, real: Tensor, step: int) -> dict[str, Tensor]:
        weights, error, terms = self.weights, made - real, {}
        if weights["gradient"]:
            terms["gradient"] = gradient_loss(error)
        if weights["l2"]:
            terms["l2"] = error.square().mean()
        if weights["l1"]:
            terms["l1"] = error.abs().mean()
        if weights["ssim"]:
            terms["ssim"] = ssim_loss(made, real)
        if self.features is not None:
            terms["features"] = self.features(made, real)
        if self.lpips is not None:
            terms["lpips"] = self.lpips(made, real)
        if self.adversary is not None and self.adversary.active(step):
            terms["adversary"] = self.adversary.term(made, real)
        return terms
