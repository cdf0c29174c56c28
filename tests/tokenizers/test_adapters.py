"""Codecs of transformers keep our contract: shapes, legality, one path, fingerprints, folders.

All weights are random: what released ones sound and look like is not checked here.
"""

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.parts import Audio, Image, Video
from mmpt.processor import Processor
from mmpt.stream import Segment, StreamBuilder, parse
from mmpt.tokenizers.base import Codec, load_codec
from mmpt.vocab import Modality

pytest.importorskip("transformers", reason="transformers is not installed: mmpt[eval]")

from mmpt.tokenizers import adapters
from mmpt.tokenizers.adapters import Adapter, adapt
from mmpt.tokenizers.adapters_image import ChameleonCodec, Emu3Codec
from mmpt.tokenizers.adapters_sound import DacCodec, EncodecCodec, MimiCodec, XcodecCodec

SOUND = {"mimi": 8, "dac": 3, "encodec": 8, "xcodec": 2}  # kind -> codebooks
PICTURES = ("emu3", "chameleon")
RATE, SECONDS = 2000, 0.31


def mimi() -> Any:
    from transformers.models.mimi.modeling_mimi import MimiConfig, MimiModel

    sizes = {"num_filters": 4, "hidden_size": 16, "intermediate_size": 32, "upsample_groups": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    books = {"codebook_size": 32, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8}
    return MimiModel(
        MimiConfig(
            sampling_rate=RATE,
            upsampling_ratios=[4, 5, 2],
            num_quantizers=8,
            **sizes,
            **heads,
            **books,
        )
    )


def dac(ratios: tuple[int, ...] = (2, 5, 4)) -> Any:
    from transformers.models.dac.modeling_dac import DacConfig, DacModel

    books = {"n_codebooks": 3, "codebook_size": 32, "codebook_dim": 4}
    return DacModel(
        DacConfig(
            sampling_rate=RATE,
            downsampling_ratios=ratios,
            encoder_hidden_size=4,
            decoder_hidden_size=16,
            **books,
        )
    )


def encodec(**changes: Any) -> Any:
    from transformers.models.encodec.modeling_encodec import EncodecConfig, EncodecModel

    sizes = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 32}
    given = {
        "sampling_rate": RATE,
        "upsampling_ratios": (4, 5, 2),
        "target_bandwidths": (0.25, 2.0),
    }
    return EncodecModel(EncodecConfig(**(sizes | given | changes)))


def xcodec() -> Any:
    from transformers.models.xcodec.modeling_xcodec import XcodecConfig, XcodecModel

    acoustic = {"encoder_hidden_size": 4, "decoder_hidden_size": 32, "hidden_size": 64}
    ratios = {"downsampling_ratios": [8, 5, 4, 2], "upsampling_ratios": [8, 5, 4, 2]}
    semantic = {"hidden_size": 16, "intermediate_size": 32, "conv_dim": [8] * 7}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    places = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return XcodecModel(
        XcodecConfig(
            target_bandwidths=(0.25, 0.5),
            codebook_size=32,
            acoustic_model_config={"model_type": "dac", **acoustic, **ratios},
            semantic_model_config={"model_type": "hubert", **semantic, **layers, **places},
        )
    )


def emu3() -> Any:
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE, Emu3VQVAEConfig

    depth = {"channel_multiplier": (1, 1), "num_res_blocks": 1, "attn_resolutions": (1,)}
    return Emu3VQVAE(Emu3VQVAEConfig(codebook_size=64, base_channels=32, hidden_size=32, **depth))


def chameleon() -> Any:
    from transformers.models.chameleon.modeling_chameleon import (
        ChameleonVQVAE,
        ChameleonVQVAEConfig,
    )

    sizes = {"embed_dim": 8, "num_embeddings": 64, "latent_channels": 8, "base_channels": 32}
    depth = {"channel_multiplier": (1, 1), "num_res_blocks": 1}
    return ChameleonVQVAE(ChameleonVQVAEConfig(**sizes, **depth))


MODELS: dict[str, Callable[[], Any]] = {
    "mimi": mimi,
    "dac": dac,
    "encodec": encodec,
    "xcodec": xcodec,
    "emu3": emu3,
    "chameleon": chameleon,
}
CLASSES: dict[str, type[Adapter]] = {
    "mimi": MimiCodec,
    "dac": DacCodec,
    "encodec": EncodecCodec,
    "xcodec": XcodecCodec,
    "emu3": Emu3Codec,
    "chameleon": ChameleonCodec,
}


def make(kind: str, **changes: Any) -> Any:
    """A small model of random weights; its codebooks are as wide as its latents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = MODELS[kind](**changes).eval()
        for name, buffer in model.named_buffers():
            if name.endswith(("codebook.embed", "codebook.embed_sum")):
                buffer.normal_(std=1.0 if kind != "encodec" else 0.005)
        if kind == "encodec":  # its random latents vary little, far from zero
            with torch.no_grad():
                latents = model.encoder(sound(6400)[None, None])[0].T
            model.quantizer.layers[0].codebook.embed.copy_(latents[1::5])
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: make(kind) for kind in MODELS}


@pytest.fixture(scope="module")
def codecs(models: dict[str, Any]) -> dict[str, Any]:
    return {kind: CLASSES[kind].of(model) for kind, model in models.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Any]) -> Path:
    """What transformers itself writes, one folder a kind."""
    place = tmp_path_factory.mktemp("transformers")
    for kind, model in models.items():
        model.save_pretrained(place / kind)
    return place


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def sound(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul(0.3).clamp(-1, 1)


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("count", [1, 79, 80, 641])
def test_a_sound_has_a_frame_for_every_hop_and_comes_back_as_long(
    codecs: dict[str, Any], kind: str, count: int
) -> None:
    codec = codecs[kind]
    codes = codec.encode(sound(count)[None])
    frames = -(-count // codec.samples_per_code)
    assert codes.shape == (1, frames, SOUND[kind])
    assert codes.dtype == torch.int64
    assert codec.num_codebooks == SOUND[kind]
    wave = codec.decode(codes)
    assert wave.shape == (1, frames * codec.samples_per_code)
    assert wave.abs().max() <= 1


@pytest.mark.parametrize("kind", MODELS)
def test_many_codes_occur_and_all_are_legal(codecs: dict[str, Any], kind: str) -> None:
    codec = codecs[kind]
    medium = sound(6400)[None] if kind in SOUND else picture(1, 3, 16, 24)
    codes = codec.encode(medium)
    assert 0 <= codes.min() <= codes.max() < codec.codebook_size
    assert all(len(book.unique()) > 3 for book in codes.flatten(0, -2).T)


@pytest.mark.parametrize("kind", ["mimi", "dac", "encodec", "xcodec", "emu3"])
def test_every_legal_code_decodes(codecs: dict[str, Any], kind: str) -> None:
    codec = codecs[kind]
    every = torch.arange(codec.codebook_size)[:, None].expand(-1, codec.num_codebooks)
    codes = every[None] if kind in SOUND else every.reshape(1, 8, 8, 1)
    assert torch.isfinite(codec.decode(codes)).all()


@pytest.mark.parametrize("kind", SOUND)
def test_a_batch_is_its_singles(codecs: dict[str, Any], kind: str) -> None:
    codec, waves = codecs[kind], torch.stack([sound(700, seed) for seed in range(3)])
    codes = codec.encode(waves)
    assert torch.equal(codes, torch.cat([codec.encode(wave[None]) for wave in waves]))
    assert not torch.equal(codes[0], codes[1])
    made = codec.decode(codes)
    assert torch.equal(made, torch.cat([codec.decode(one[None]) for one in codes]))


@settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(0, 700), max_size=4), kind=st.sampled_from(sorted(SOUND)))
def test_a_streamed_sound_has_the_codes_of_the_whole(
    codecs: dict[str, Any], cuts: list[int], kind: str
) -> None:
    codec, wave, stream = codecs[kind], sound(700), codecs[kind].stream()
    pieces = torch.tensor_split(wave, sorted(cuts))
    codes = torch.cat([*[stream.push(piece) for piece in pieces], stream.flush()])
    assert torch.equal(codes, codec.encode(wave[None])[0])
    assert stream.flush().shape == (0, SOUND[kind])
    decoder = codec.decode_stream()
    made = torch.cat([*[decoder.push(row[None]) for row in codes], decoder.flush()])
    assert torch.equal(made, codec.decode(codes[None])[0])


def test_codes_are_those_of_the_model_itself(codecs: dict[str, Any], models: Any) -> None:
    wave, pixels = sound(640)[None], picture(1, 3, 16, 24)
    with torch.inference_mode():
        theirs = {
            "mimi": models["mimi"].encode(wave[None]).audio_codes[0].T,
            "dac": models["dac"].encode(wave[None]).audio_codes[0].T,
            "encodec": models["encodec"].encode(wave[None], bandwidth=2.0).audio_codes[0, 0].T,
            "xcodec": models["xcodec"].encode(wave[None]).audio_codes[0].T,
            "emu3": models["emu3"].encode(pixels, torch.tensor([[16, 24]])).image_tokens[0],
            "chameleon": models["chameleon"].encode(pixels).image_tokens.reshape(8, 12),
        }
    for kind, codes in theirs.items():
        [ours] = codecs[kind].encode(wave if kind in SOUND else pixels)
        assert torch.equal(ours, codes if kind in SOUND else codes[..., None]), kind


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_of_any_sides_have_a_grid_of_codes(codecs: dict[str, Any], kind: str) -> None:
    codec, pixels = codecs[kind], picture(3, 3, 6, 10)
    codes = codec.encode(pixels)
    assert codec.factor == 2
    assert codes.shape == (3, 3, 5, 1)
    assert torch.equal(codes, torch.cat([codec.encode(one[None]) for one in pixels]))
    stream = codec.stream()
    pieces = [stream.push(pixels[place]) for place in (slice(1), slice(1, 1), slice(1, 3))]
    assert torch.equal(torch.cat(pieces), codes)
    assert len(stream.flush()) == 0


def test_emu3_codes_clips_and_a_picture_is_a_still_clip(codecs: dict[str, Any]) -> None:
    codec, clip = codecs["emu3"], picture(2, 8, 3, 4, 6)
    codes = codec.encode(clip)
    assert codes.shape == (2, 2, 2, 3, 1)
    assert codec.decode(codes).shape == (2, 8, 3, 4, 6)
    still = clip[:1, :1].expand(1, 4, -1, -1, -1)
    assert torch.equal(codec.encode(still)[:, 0], codec.encode(still[:, 0]))
    changed = clip.clone()
    changed[:, -1] = 0
    assert torch.equal(codec.encode(changed)[:, 0], codes[:, 0])
    with pytest.raises(UserError, match="7 frames; use a multiple of 4"):
        codec.encode(clip[:, :7])


def test_emu3_makes_pictures_and_chameleon_none(codecs: dict[str, Any]) -> None:
    codes = codecs["emu3"].encode(picture(2, 3, 4, 6))
    made = codecs["emu3"].decode(codes)
    assert made.shape == (2, 3, 4, 6)
    assert made.abs().max() <= 1
    with pytest.raises(UserError, match="no decoder for Chameleon"):
        codecs["chameleon"].decode(codes)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("no_network")
def test_a_folder_of_transformers_and_our_own_open_as_the_same_codec(
    codecs: dict[str, Any], folder: Path, kind: str, tmp_path: Path
) -> None:
    opened = load_codec(folder / kind)
    assert isinstance(opened, CLASSES[kind])
    assert (opened.kind, opened.name) == (kind, kind)
    opened.save(tmp_path / "again")
    again = load_codec(tmp_path / "again")
    medium = sound(700)[None] if kind in SOUND else picture(1, 3, 16, 24)
    for codec in (opened, again):
        assert codec.fingerprint == codecs[kind].fingerprint
        assert torch.equal(codec.encode(medium), codecs[kind].encode(medium))
        assert not codec.train().training


@pytest.mark.parametrize("kind", MODELS)
def test_the_fingerprint_follows_what_makes_the_codes(kind: str) -> None:
    model = make(kind)
    before = CLASSES[kind].of(model).fingerprint
    with torch.no_grad():
        decoder = "acoustic_decoder" if kind == "xcodec" else "decoder"
        if hasattr(model, decoder):
            next(getattr(model, decoder).parameters()).add_(1)
            assert CLASSES[kind].of(model).fingerprint == before
        part = CLASSES[kind].defining[0]
        # less than half precision would see
        next(getattr(model, part).parameters()).mul_(1 + 1e-6)
    assert CLASSES[kind].of(model).fingerprint != before


@pytest.mark.parametrize("kind", MODELS)
def test_latents_are_what_a_code_stands_for(codecs: dict[str, Any], kind: str) -> None:
    codec = codecs[kind]
    latents = codec.code_latents()
    books = [SOUND[kind]] if kind in SOUND else []
    assert list(latents.shape[:-1]) == [*books, codec.codebook_size]
    assert len(latents.flatten(0, -2).unique(dim=0)) == latents.flatten(0, -2).shape[0]


def test_mimi_follows_its_codebooks_to_another_place(models: dict[str, Any]) -> None:
    codec = MimiCodec.of(make("mimi"))
    before = codec.encode(sound(700)[None])
    codec.to(torch.float64).to(torch.float32)  # as a move to a device, it makes tensors anew
    assert codec._books()[0]._embed is None
    assert torch.equal(codec.encode(sound(700)[None]), before)


@pytest.mark.parametrize("kind", SOUND)
def test_the_first_codebooks_alone_are_a_codec(
    codecs: dict[str, Any], folder: Path, tmp_path: Path, kind: str
) -> None:
    few, wave = adapt(folder / kind, num_codebooks=2), sound(700)[None]
    codes = codecs[kind].encode(wave)
    assert torch.equal(few.encode(wave), codes[..., :2])
    assert few.decode(codes[..., :2]).shape == codecs[kind].decode(codes).shape
    assert few.fingerprint != codecs[kind].fingerprint
    few.save(tmp_path / "few")
    again = load_codec(tmp_path / "few")
    assert (again.num_codebooks, again.fingerprint) == (2, few.fingerprint)


def test_a_number_of_codebooks_that_there_is_not_is_refused(folder: Path) -> None:
    for count in (-1, 9):
        with pytest.raises(UserError, match=f"num_codebooks = {count}"):
            adapt(folder / "mimi", num_codebooks=count)
    with pytest.raises(UserError, match="emu3 has a single one"):
        adapt(folder / "emu3", num_codebooks=2)


def test_codes_that_are_not_legal_are_refused(codecs: dict[str, Any]) -> None:
    for kind, count in SOUND.items():
        for bad in (-1, 32):
            with pytest.raises(UserError, match=r"must be in \[0, 32\)"):
                codecs[kind].decode(torch.full((1, 2, count), bad))
        with pytest.raises(UserError, match=f"the last of size {count}"):
            codecs[kind].decode(torch.zeros(1, 2, count + 1, dtype=torch.int64))
    for kind in PICTURES:
        with pytest.raises(UserError, match=r"must be in \[0, 64\)"):
            codecs[kind].decode(torch.full((1, 2, 2, 1), 64))


def test_media_that_are_no_media_are_refused_in_one_line(codecs: dict[str, Any]) -> None:
    for wave in (torch.zeros(1, 0), torch.zeros(5), torch.full((1, 9), torch.nan)):
        with pytest.raises(UserError, match="wave must be"):
            codecs["dac"].encode(wave)
    for pixels, message in (
        (torch.zeros(1, 3, 5, 4), "no multiples of 2"),
        (torch.zeros(3, 4, 4), "need 4 dimensions"),
        (torch.zeros(1, 1, 4, 4), "need 4 dimensions"),
        (torch.full((1, 3, 4, 4), 2.0), r"in \[-1, 1\]"),
        (torch.zeros(1, 3, 2, 4096), "at most 2048 pixels"),
    ):
        for kind in PICTURES:
            with pytest.raises(UserError, match=message):
                codecs[kind].encode(pixels)


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_that_is_too_long_is_refused_before_it_fills_memory(
    codecs: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmpt.tokenizers.adapters_sound.MAX_SECONDS", 0.5)
    codec = codecs[kind]
    limit = codec.sample_rate // 2
    stream = codec.stream()
    stream.push(torch.zeros(limit))
    with pytest.raises(UserError, match=f"{limit + 1} samples in one piece.*at most {limit}"):
        stream.push(torch.zeros(1))
    with pytest.raises(UserError, match="in one piece"):
        codec.encode(torch.zeros(1, limit + 1))
    with pytest.raises(UserError, match="frames of codes in one piece"):
        codec.decode(
            torch.zeros(1, limit // codec.samples_per_code + 2, SOUND[kind], dtype=torch.int64)
        )


def test_codecs_with_state_beside_the_codes_are_refused() -> None:
    for changes, message in (
        ({"normalize": True}, "normalize = True"),
        ({"chunk_length_s": 1.0, "overlap": 0.01}, "chunks of 1.0 s"),
        ({"audio_channels": 2}, "2 channels"),
    ):
        with pytest.raises(UserError, match=message):
            EncodecCodec.of(encodec(**changes))


def test_the_picture_tokenizer_is_found_in_a_whole_model_of_many_files(
    models: dict[str, Any], codecs: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    state = models["emu3"].state_dict()
    names = sorted(state)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    index = {}
    for number, half in enumerate(halves):
        file = f"model-{number}.safetensors"
        tensors = {f"model.vqmodel.{name}": state[name] for name in half}
        tensors[f"model.text_model.{number}"] = torch.zeros(2)
        save_file(tensors, tmp_path / file)
        index |= dict.fromkeys(tensors, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    inner = models["emu3"].config.to_diff_dict()
    config = {"model_type": "emu3", "vq_config": inner, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    codec = load_codec(tmp_path)
    assert codec.fingerprint == codecs["emu3"].fingerprint
    scaling = {"rescale_factor": 0.0078, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(scaling))
    scaled = load_codec(tmp_path)
    assert isinstance(scaled, Emu3Codec)
    assert scaled.fingerprint != codec.fingerprint
    assert torch.allclose(scaled._theirs(torch.ones(1, 3, 2, 2)), torch.tensor(0.0078 * 255 - 1))
    pixels = picture(1, 3, 4, 4)
    assert torch.allclose(scaled._ours(scaled._theirs(pixels)), pixels, atol=1e-5)


def test_folders_that_do_not_fit_are_refused_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "dac" / "config.json").read_text())
    weights = (folder / "dac" / "model.safetensors").read_bytes()

    def case(changes: dict, data: bytes | None = weights) -> Path:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config | changes))
        if data is not None:
            (place / "model.safetensors").write_bytes(data)
        return place

    for place, message in (
        (case({"model_type": "llama"}), "'llama' model of transformers; these open as a codec"),
        (case({}, None), "needs model.safetensors"),
        (case({}, b"no weights"), "cannot read the weights"),
        (case({"n_codebooks": 4}), "weights are missing"),
        (case({"encoder_hidden_size": 8}), "another shape|does not make a DacModel"),
        (case({"codebook_size": 33}), "does not make a DacModel"),
        (case({"n_codebooks": "three"}), "does not make a DacModel"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_codec(place)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "transformers.models.dac.modeling_dac", None)
    with pytest.raises(UserError, match=r"pip install 'mmpt\[eval\]'"):
        load_codec(folder / "dac")


def test_only_codecs_of_transformers_are_adapted(zoo: Path) -> None:
    with pytest.raises(UserError, match="kind image, none of transformers"):
        adapt(zoo / "image")


def test_strides_that_do_not_divide_still_give_whole_frames() -> None:
    codec = DacCodec.of(make("dac", ratios=(3, 5)))
    codes = codec.encode(sound(100)[None])
    assert codes.shape == (1, 7, 3)
    assert codec.decode(codes).shape == (1, 105)


@pytest.mark.parametrize("kind", sorted(SOUND))
def test_speech_of_several_codebooks_goes_through_a_document_and_back(
    zoo: Path, folder: Path, kind: str
) -> None:
    names = [str(zoo / "text"), str(zoo / "image"), str(folder / kind)]
    processor = Processor.load(names)
    vocabulary, codec = processor.vocabulary, processor.media[Modality.SPEECH]
    count = SOUND[kind]
    assert [r.name for r in vocabulary.ranges] == ["visual", *[f"speech-{q}" for q in range(count)]]
    wave = sound(1000).numpy()
    [segment] = processor.encode_parts([Audio(wave, codec.sample_rate)])
    frames = -(-1000 // codec.samples_per_code)  # type: ignore[attr-defined] # a codec of sound
    assert segment.codes.shape == (frames * count,)
    stream = StreamBuilder(vocabulary).structure("<bod>").media(*segment).build()
    [span] = stream.spans
    assert (span.length, span.grid) == (frames * count, (1, 1, frames * count))
    [read] = parse(stream.ids, vocabulary)
    codes = torch.from_numpy(read.codes).reshape(1, frames, count)
    assert torch.equal(codes, codec.encode(torch.from_numpy(wave)[None]))
    [made] = processor.decode_segments([read])
    assert isinstance(made, Audio)
    assert np.array_equal(made.wave, codec.decode(codes)[0].numpy())
    with pytest.raises(UserError, match=f"no whole frames of {count}"):
        processor.decode_segments([Segment(Modality.SPEECH, read.codes[:-1])])


def test_pictures_of_an_adapter_go_through_a_processor(zoo: Path, folder: Path) -> None:
    processor = Processor.load([str(zoo / "text"), str(folder / "emu3")], max_side=8)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    [segment] = processor.encode_parts([Image(pixels)])
    assert segment.codes.shape == (4, 3)
    [made] = processor.decode_segments([segment])
    assert isinstance(made, Image)
    assert made.pixels.shape == (8, 6, 3)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("encodec", Audio(sound(1000).numpy(), RATE)),
        ("emu3", Image(np.full((9, 7, 3), 200, dtype=np.uint8))),
    ],
)
def test_a_file_makes_the_round_trip(
    folder: Path, tmp_path: Path, kind: str, part: Audio | Image
) -> None:
    from mmpt.tokenizers.evaluate import roundtrip

    suffix = ".wav" if isinstance(part, Audio) else ".png"
    part.save(tmp_path / f"in{suffix}")
    result = roundtrip(str(folder / kind), tmp_path / f"in{suffix}", out=tmp_path / f"out{suffix}")
    made = type(part).load(tmp_path / f"out{suffix}")
    if isinstance(part, Audio):
        assert isinstance(made, Audio)
        assert made.wave.shape == part.wave.shape
        assert (result["shape"], result["codes"], result["bits"]) == ([25], 200, 1000)
    else:
        assert isinstance(made, Image)
        assert made.pixels.shape == part.pixels.shape
        assert (result["shape"], result["bits"]) == ([5, 4], 120)
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    Video(frames, 8.0).save(tmp_path / "clip.gif")
    with pytest.raises(UserError, match="cannot read a video"):
        roundtrip(str(folder / kind), tmp_path / "clip.gif", out=tmp_path / "out.gif")


def test_every_kind_of_the_table_is_known() -> None:
    from mmpt.tokenizers import KINDS

    assert set(adapters.KIND_OF.values()) == set(MODELS) <= set(KINDS)
    assert all(issubclass(made, Codec) for made in CLASSES.values())
