"""Shapes of image codecs by name: those of published models, and small ones for a laptop.

A published preset has the quantiser, codebook and factor of its source, in a convolutional backbone
of ours of a similar size. Released weights do not fit it.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from mmpt.config import UserError
from mmpt.tokenizers.image import ImageCodecConfig
from mmpt.tokenizers.quantize import QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """source: where the shape comes from; config: the shape."""

    source: str
    config: ImageCodecConfig


PRESETS = {
    "emu3.5": Preset(
        source="Emu3.5 (arXiv 2510.26583): IBQ, 131,072 codes of 256 channels, 455M parameters",
        config=ImageCodecConfig(
            quantizer=QuantizerConfig(kind="ibq", codebook_size=131_072, width=256),
            factor=16,
            encoder_width=1024,
            encoder_blocks=6,
            decoder_width=1280,
            decoder_blocks=8,
        ),
    ),
    "llamagen": Preset(
        source="LlamaGen (arXiv 2406.06525): 16,384 l2-normalised codes of 8 channels; learned "
        "there by a loss, here by moving averages",
        config=ImageCodecConfig(
            quantizer=QuantizerConfig(kind="ema", codebook_size=16_384, width=8),
            factor=16,
            encoder_width=512,
            encoder_blocks=4,
            decoder_width=640,
            decoder_blocks=5,
        ),
    ),
    "cosmos": Preset(
        source="Cosmos tokenizer (arXiv 2501.03575), DI16x16: FSQ of 8, 8, 8, 5, 5 and 5 levels",
        config=ImageCodecConfig(
            quantizer=QuantizerConfig(kind="fsq", levels=(8, 8, 8, 5, 5, 5)),
            factor=16,
            encoder_width=512,
            encoder_blocks=4,
            decoder_width=640,
            decoder_blocks=5,
        ),
    ),
    "chameleon": Preset(
        source="Chameleon (arXiv 2405.09818): 8,192 codes of 256 channels, 1,024 for 512 x 512 "
        "pixels; learned there by a loss, here by moving averages",
        config=ImageCodecConfig(
            quantizer=QuantizerConfig(kind="ema", codebook_size=8192, width=256),
            factor=16,
            encoder_width=512,
            encoder_blocks=4,
            decoder_width=640,
            decoder_blocks=5,
        ),
    ),
    "conv-f8": Preset(source="the shipped image-f8", config=ImageCodecConfig()),
    "transformer-f8": Preset(
        source="small; FSQ (arXiv 2309.15505) over neighbourhood attention (arXiv 2204.07143)",
        config=ImageCodecConfig(
            backbone="transformer",
            encoder_width=128,
            encoder_blocks=2,
            decoder_width=192,
            decoder_blocks=4,
        ),
    ),
    "simvq-f8": Preset(
        source="small; SimVQ (arXiv 2411.02038), 1,024 codes",
        config=ImageCodecConfig(
            quantizer=QuantizerConfig(kind="simvq", codebook_size=1024, width=16)
        ),
    ),
    "lfq-f8": Preset(
        source="small; LFQ (arXiv 2310.05737), 10 bits",
        config=ImageCodecConfig(
            quantizer=QuantizerConfig(kind="lfq", codebook_size=1024, width=10)
        ),
    ),
}


def preset_config(
    name: str, *, encoder_width: int | None = None, decoder_width: int | None = None
) -> ImageCodecConfig:
    """The shape that NAME stands for, with other widths where they are given.

    Raises UserError for an unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"no preset {name!r} of image codecs; choose one of {', '.join(PRESETS)}")
    config = PRESETS[name].config
    return replace(
        config,
        encoder_width=encoder_width or config.encoder_width,
        decoder_width=decoder_width or config.decoder_width,
    )


def list_presets() -> dict[str, list[dict[str, Any]]]:
    """Every preset: what it is, where its shape comes from."""
    rows = []
    for name, preset in PRESETS.items():
        config = preset.config
        quantizer = config.quantizer
        levels = math.prod(quantizer.levels) if quantizer.levels else 0
        rows.append(
            {
                "name": name,
                "source": preset.source,
                "quantizer": quantizer.kind,
                "codebook_size": levels or quantizer.codebook_size,
                "factor": config.factor,
                "backbone": config.backbone,
            }
        )
    return {"presets": rows}
