"""Codecs: media <-> integer codes. `load` opens a shipped or a saved one by name or path."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmpt.tokenizers.base import Codec

# every kind of codec that a config.json can name
KINDS = {
    "text": "mmpt.tokenizers.text:TextCodec",
    "image": "mmpt.tokenizers.image:ImageCodec",
    "video": "mmpt.tokenizers.video:VideoCodec",
    "speech": "mmpt.tokenizers.speech:SpeechCodec",
    # of the library transformers
    "emu3": "mmpt.tokenizers.adapters_image:Emu3Codec",
    "chameleon": "mmpt.tokenizers.adapters_image:ChameleonCodec",
    "mimi": "mmpt.tokenizers.adapters_sound:MimiCodec",
    "dac": "mmpt.tokenizers.adapters_sound:DacCodec",
    "encodec": "mmpt.tokenizers.adapters_sound:EncodecCodec",
    "xcodec": "mmpt.tokenizers.adapters_sound:XcodecCodec",
}


def load(name_or_path: str) -> "Codec":
    """Open a codec: a name of the shipped zoo or a folder. Raises UserError when there is none."""
    from mmpt.tokenizers.base import load_codec

    return load_codec(name_or_path)
