"""What the video codec adds to the image codec: causal convolutions over latents.

Inflation: the last temporal slice of a kernel is an image kernel, the slice before starts at zero.
What is added to the image codec's latents, to its decoder's input and kernels, and to the picture
that it draws starts at zero, too: an untrained video codec codes the mean of four frames as one
picture. A stream keeps the last input of each convolution and nothing else. Norms act on one
position of one latent.

Legend: B batch, C context width, c features of the image codec, H W pixels, h w codes.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmpt.config import UserError
from mmpt.tokenizers.backbones import PATCH, ChannelNorm
from mmpt.tokenizers.image import ImageCodec

GROUP = 4  # frames that one latent after the first stands for

Memory = dict[nn.Module, Tensor]  # the last input of every causal convolution of one stream


@dataclass(frozen=True, kw_only=True)
class VideoCodecConfig:
    """image: name and fingerprint of the image codec inside; width in channels, of the context.

    encoder_blocks, num_blocks and fine_blocks: of the encoder, of the decoder's context, and of
    what makes four frames of a picture, in fine_width channels. rank: of what is added to each
    kernel of the image codec's decoder for pictures after the first; 0: nothing.
    """

    image: str = ""
    image_fingerprint: str = ""
    width: int = 128
    encoder_blocks: int = 2
    num_blocks: int = 2
    fine_width: int = 64
    fine_blocks: int = 2
    rank: int = 16

    def __post_init__(self) -> None:
        for name in ("width", "encoder_blocks", "num_blocks", "fine_width", "fine_blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}; use 1 or more")
        if self.rank < 0:
            raise UserError(f"rank = {self.rank}; use 0 for none, or more")


class CausalConv(nn.Module):
    """A convolution over (t, h, w) with a kernel of 2 x 3 x 3, one latent at a time.

    The earlier slice is zero at first, so that it is an image convolution, and outside of its
    middle of `reach` x `reach` for good.
    """

    def __init__(self, width: int, reach: int) -> None:
        super().__init__()
        self.now = nn.Conv2d(width, width, 3, padding=1)
        self.before = nn.Conv2d(width, width, reach, padding=reach // 2, bias=False)
        nn.init.zeros_(self.before.weight)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(B, C, h, w) -> same; before the first latent there is nothing to see."""
        made, last = self.now(x), memory.get(self)
        memory[self] = x
        return made if last is None else made + self.before(last)


class CausalBlock(nn.Module):
    """Pre-norm residual block of two causal convolutions, SiLU between."""

    def __init__(self, width: int, *, reach: int = 1) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.first, self.second = CausalConv(width, reach), CausalConv(width, reach)
        _zero(self.second.now)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(B, C, h, w) -> same."""
        return x + self.second(F.silu(self.first(self.norm(x), memory)), memory)


class LowRank(nn.Module):
    """Adds a low-rank term, zero at first, to each kernel of a frozen module (arXiv 2106.09685)."""

    def __init__(self, module: nn.Module, rank: int) -> None:
        super().__init__()
        kernels = {name: p for name, p in module.named_parameters() if p.ndim in (2, 4)}
        self.names = list(kernels)
        self.down = nn.ParameterList(
            torch.randn(rank, p[0].numel()) * p[0].numel() ** -0.5 for p in kernels.values()
        )
        self.up = nn.ParameterList(torch.zeros(p.shape[0], rank) for p in kernels.values())

    def forward(self, module: nn.Module) -> dict[str, Tensor]:
        """The changed kernels, by name, of `module`, which has the shape that this was made for."""
        kernels = dict(module.named_parameters())
        return {
            name: kernels[name] + (up @ down).view_as(kernels[name])
            for name, up, down in zip(self.names, self.up, self.down, strict=True)
        }


@dataclass
class Known:
    """What the codes so far have told, equal in encoder and decoder; grows with no frame.

    context: (B, C, h, w); shown: image features of the last frame, (B, c, h, w).
    """

    memory: Memory
    context: Tensor
    shown: Tensor


class Temporal(nn.Module):
    """What the video codec adds to the image codec; untrained, it changes nothing."""

    def __init__(self, config: VideoCodecConfig, image: ImageCodec) -> None:
        super().__init__()
        width, fine, latent = config.width, config.fine_width, image.quantizer.width
        self.shuffle = image.factor // PATCH
        seen = image.config.encoder_width
        self.see = nn.Conv2d((GROUP + 1) * seen, width, 1)  # of four frames and their mean
        self.compare = nn.Conv2d(seen, width, 1)  # with the last frame that is shown
        self.encode = nn.ModuleList(CausalBlock(width) for _ in range(config.encoder_blocks))
        self.to_latents = nn.Sequential(ChannelNorm(width), nn.Conv2d(width, latent, 1))
        self.from_latents = nn.Conv2d(latent, width, 3, padding=1)
        self.recall = nn.Conv2d(seen, width, 1)
        self.know = nn.ModuleList(CausalBlock(width) for _ in range(config.num_blocks))
        self.norm = ChannelNorm(width)
        self.to_input = nn.Conv2d(width, image.config.decoder_width, 1)
        self.adapt = LowRank(image.decoder, config.rank) if config.rank else None
        self.up = nn.Conv2d(width, self.shuffle**2 * fine, 1)
        self.look = nn.Conv2d(3 * PATCH**2, fine, 1)
        blocks = [CausalBlock(fine, reach=3) for _ in range(config.fine_blocks)]
        self.fine = nn.ModuleList(blocks)
        self.fine_norm = ChannelNorm(fine)
        self.head = nn.Conv2d(fine, GROUP * 3 * PATCH**2, 3, padding=1)
        for module in (self.to_latents[1], self.to_input, self.head):
            _zero(module)

    def latents(self, features: Tensor, known: Known, memory: Memory) -> Tensor:
        """Features (B, 5, c, h, w) and what the decoder knows -> what to add to the latents."""
        x = self.see(rearrange(features, "b g c h w -> b (g c) h w"))
        x = x + self.compare(known.shown) + known.context
        for block in self.encode:
            x = block(x, memory)
        return self.to_latents(x)

    def context(self, latents: Tensor, shown: Tensor | None, memory: Memory) -> Tensor:
        """Quantised latents (B, D, h, w) -> what they and those before tell (B, C, h, w)."""
        x = self.from_latents(latents)
        if shown is not None:
            x = x + self.recall(shown)
        for block in self.know:
            x = block(x, memory)
        return self.norm(x)

    def details(self, picture: Tensor, context: Tensor, memory: Memory) -> Tensor:
        """A drawn picture (B, 3, H, W) -> features at a quarter of each side; remembers them."""
        x = F.pixel_shuffle(self.up(context), self.shuffle)
        x = x + self.look(F.pixel_unshuffle(picture, PATCH))
        for block in self.fine:
            x = block(x, memory)
        return self.fine_norm(x)

    def frames(self, picture: Tensor, context: Tensor, memory: Memory) -> Tensor:
        """One picture in, four frames out: (B, 3, H, W) -> (B, 4, 3, H, W), not clipped."""
        changes = F.pixel_shuffle(self.head(self.details(picture, context, memory)), PATCH)
        return picture[:, None] + rearrange(changes, "b (g c) h w -> b g c h w", g=GROUP)


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
