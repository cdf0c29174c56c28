"""Small random codecs: the contract holds for any weights, so none need training."""

from pathlib import Path

import pytest
import torch

from mmpt.tokenizers.image import ImageCodec, ImageCodecConfig
from mmpt.tokenizers.speech import SpeechCodec, SpeechCodecConfig
from mmpt.tokenizers.text import TextCodec
from mmpt.tokenizers.video import VideoCodec, VideoCodecConfig


def _randomise(module: torch.nn.Module) -> None:
    # zero-initialised branches would hide what depends on what
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(scope="session")
def image_codec(tmp_path_factory: pytest.TempPathFactory) -> ImageCodec:
    torch.manual_seed(0)
    codec = ImageCodec(ImageCodecConfig(encoder_width=16, decoder_width=16, decoder_blocks=1))
    _randomise(codec)
    folder = tmp_path_factory.mktemp("zoo") / "image"
    codec.save(folder)
    codec.load_weights(folder)  # fp16 values, as every codec that is in use
    codec.name = "image"
    return codec.eval()


@pytest.fixture(scope="session")
def video_codec(image_codec: ImageCodec) -> VideoCodec:
    torch.manual_seed(0)
    codec = VideoCodec(VideoCodecConfig(width=16, num_blocks=1), image_codec)
    _randomise(codec.temporal)
    return codec.eval()


@pytest.fixture(scope="session")
def speech_codec() -> SpeechCodec:
    torch.manual_seed(0)
    codec = SpeechCodec(SpeechCodecConfig(codebook_size=64, width=32, num_layers=1, num_heads=2))
    _randomise(codec)
    codec.quantizer.initialise(torch.randn(500, 16), torch.Generator().manual_seed(0))
    return codec.eval()


@pytest.fixture(scope="session")
def text_codec() -> TextCodec:
    return TextCodec.train_on(["a red apple on a red table"] * 20, num_text=280)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "codec"
