"""The speech codec in all its shapes: what it promises, how it begins, what it refuses."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.parts import Audio, Part, Text
from mmpt.tokenizers.base import load_codec
from mmpt.tokenizers.objectives import SpeechObjective
from mmpt.tokenizers.objectives.voices import vary, warp
from mmpt.tokenizers.objectives.waves import wave_loss
from mmpt.tokenizers.quantize import QuantizerConfig
from mmpt.tokenizers.recipe import CodecRecipe
from mmpt.tokenizers.speech import PRESETS, SpeechCodec, SpeechCodecConfig
from mmpt.tokenizers.vocoder import (
    HOP,
    SILENCE,
    WINDOW,
    GriffinLim,
    WaveHead,
    log_mel,
    overlap_add,
    overlap_weight,
)

few = settings(max_examples=6, deadline=None)
SMALL = {"width": 16, "num_layers": 1, "num_heads": 2, "vocoder": "istft", "vocoder_width": 8}
ONE = QuantizerConfig(kind="ema", codebook_size=32, width=8)
SHAPES = {
    "one codebook": SpeechCodecConfig(quantizer=ONE, **SMALL),
    "griffin-lim": SpeechCodecConfig(quantizer=ONE, **SMALL | {"vocoder": "griffin-lim"}),
    "residual, short blocks": SpeechCodecConfig(
        quantizer=replace(ONE, num_codebooks=3), block=2, context=5, **SMALL
    ),
    "fsq, no context": SpeechCodecConfig(
        quantizer=QuantizerConfig(kind="fsq", levels=(5, 4, 3)), block=4, context=0, **SMALL
    ),
}


def build(config: SpeechCodecConfig) -> SpeechCodec:
    """A codec with random weights and a codebook that fits noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = SpeechCodec(config)
        for parameter in codec.parameters():
            # what begins at zero would hide what depends on what
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        features = codec.encode_features(log_mel(noise(16, 40 * HOP * 8 * 2)))
        flat = features.detach().flatten(0, 1)
        codec.quantizer.initialise(flat, torch.Generator().manual_seed(0))
    return codec.eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(scope="module", params=SHAPES)
def codec(request: pytest.FixtureRequest) -> SpeechCodec:
    return build(SHAPES[request.param])


@pytest.fixture(scope="module")
def small() -> SpeechCodec:
    return build(SHAPES["one codebook"])


@few
@given(plan=st.lists(st.integers(0, 9000), max_size=4), num_samples=st.integers(1, 30_000))
def test_any_chunking_gives_the_codes_of_the_whole(
    codec: SpeechCodec, plan: list[int], num_samples: int
) -> None:
    wave = noise(num_samples)
    stream, place, codes = codec.stream(), 0, []
    for size in [*plan, num_samples]:
        codes.append(stream.push(wave[place : place + size]))
        place += size
    codes = torch.cat([*codes, stream.flush()])
    assert codes.shape == (-(-num_samples // 1280), codec.num_codebooks)
    assert torch.equal(codes, codec.encode(wave[None])[0])


def test_sound_that_changes_has_codes_that_differ(codec: SpeechCodec) -> None:
    wave = noise(1, 40 * 1280) * torch.linspace(0, 5, 40).repeat_interleave(1280)
    assert codec.encode(wave).unique().numel() > 1  # or equal codes would prove nothing


@few
@given(plan=st.lists(st.integers(0, 12), max_size=4), num_codes=st.integers(1, 25))
def test_codes_decode_the_same_in_pieces(
    codec: SpeechCodec, plan: list[int], num_codes: int
) -> None:
    shape = (1, num_codes, codec.num_codebooks)
    codes = torch.randint(codec.codebook_size, shape, generator=torch.Generator().manual_seed(1))
    stream, place, wave = codec.decode_stream(), 0, []
    for size in [*plan, num_codes]:
        wave.append(stream.push(codes[0, place : place + size]))
        place += size
    wave = torch.cat([*wave, stream.flush()])
    assert torch.equal(wave, codec.decode(codes)[0])
    assert len(wave) == 1280 * num_codes
    assert torch.isfinite(wave).all()
    assert wave.abs().max() <= 1


def test_a_batch_is_its_singles_and_later_sound_leaves_earlier_blocks_alone(
    codec: SpeechCodec,
) -> None:
    wave = noise(2, 3 * codec.block_samples + 100)
    codes = codec.encode(wave)
    singles = [codec.encode(samples[None]) for samples in wave]
    assert torch.equal(codes, torch.cat(singles))
    sounds = [codec.decode(row[None]) for row in codes]
    assert torch.equal(codec.decode(codes), torch.cat(sounds))
    changed = wave.clone()
    changed[:, 2 * codec.block_samples :] *= -3
    earlier = 2 * codec.config.block
    assert torch.equal(codec.encode(changed)[:, :earlier], codes[:, :earlier])
    other = codes.clone()
    other[:, earlier:] = (other[:, earlier:] + 1) % codec.codebook_size
    # the last 30 ms before a block are still open, and a window reaches 30 ms further
    safe = 2 * codec.block_samples - 2 * WINDOW
    assert torch.equal(codec.decode(other)[:, :safe], codec.decode(codes)[:, :safe])


def test_streams_compute_what_training_computes(codec: SpeechCodec) -> None:
    wave = noise(2, 4 * codec.block_samples)
    offline = codec.quantizer(codec.encode_features(log_mel(wave))).codes
    assert (offline == codec.encode(wave)).float().mean() > 0.95  # up to rounding


def test_a_saved_codec_gives_the_same_codes_and_fingerprint(codec: SpeechCodec, tmp_path) -> None:
    codec.save(tmp_path)
    loaded = load_codec(tmp_path)
    assert isinstance(loaded, SpeechCodec)
    assert loaded.fingerprint == codec.fingerprint
    assert loaded.config == codec.config
    codec.load_weights(tmp_path)  # as stored: in half precision
    wave = noise(1, 20_000)
    assert torch.equal(loaded.encode(wave), codec.encode(wave))


def test_the_fingerprint_follows_the_codes_and_not_the_vocoder(small: SpeechCodec) -> None:
    before = small.fingerprint
    with torch.no_grad():
        for module in (small.wave_head.to_bins, small.to_mel[-1]):
            module.weight.mul_(2)  # type: ignore[operator] # both are linear
        assert small.fingerprint == before
        small.shortcut.weight.mul_(2)
        assert small.fingerprint != before
        small.shortcut.weight.div_(2)
    plain = SpeechCodec(replace(small.config, vocoder="griffin-lim"))
    plain.load_state_dict(small.state_dict(), strict=False)
    assert plain.fingerprint == before


def held_bytes(stream: object) -> int:
    """Bytes of all storages that a stream keeps alive, its codec apart."""
    storages, todo = {}, [v for k, v in vars(stream).items() if k not in ("codec", "head")]
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list):
            todo += value
        elif hasattr(value, "push"):
            todo += [v for k, v in vars(value).items() if k not in ("codec", "head")]
    return sum(storages.values())


@pytest.mark.parametrize("shape", ["one codebook", "griffin-lim"])
def test_streams_hold_the_same_memory_however_long_they_run(shape: str) -> None:
    codec = build(SHAPES[shape])
    stream, decoder, held = codec.stream(), codec.decode_stream(), []
    for second in range(8):
        codes = stream.push(noise(16_000, seed=second))
        decoder.push(codes)
        held.append((held_bytes(stream), held_bytes(decoder)))
    # blocks and seconds meet every fourth
    assert held[3] == held[7]
    assert max(h[0] for h in held) <= held[0][0] + 4 * codec.block_samples


def test_two_minutes_of_noise_are_as_good_as_two_seconds(small: SpeechCodec) -> None:
    wave = noise(120 * 16_000)
    codes = small.encode(wave[None])
    assert codes.shape == (1, 1500, 1)
    # a block depends on itself and its context, wherever it is
    context, block = small.config.context, small.config.block
    place = 1400
    piece = wave[(place - context) * 1280 - WINDOW :][: (context + block) * 1280 + WINDOW]
    mel = log_mel(piece[None])[:, WINDOW // HOP :]
    alone = small.quantizer(small.encode_windows(mel)).codes
    assert torch.equal(alone[0], codes[0, place : place + block])
    assert small.decode(codes).shape == (1, 120 * 16_000)


@pytest.mark.parametrize(
    ("wave", "words"),
    [
        (torch.zeros(1, 0), "not empty"),
        (torch.zeros(0, 5), "not empty"),
        (torch.zeros(5), "not empty"),
        (torch.tensor([[0.0, torch.nan]]), "no finite numbers"),
        (torch.tensor([[0.0, -torch.inf]]), "no finite numbers"),
        (torch.zeros(1, 5, dtype=torch.int16), "float"),
    ],
)
def test_what_is_no_wave_is_refused_in_one_line(
    small: SpeechCodec, wave: torch.Tensor, words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        small.encode(wave)
    assert "\n" not in str(caught.value)


def test_streams_refuse_what_is_no_wave_and_go_on(small: SpeechCodec) -> None:
    stream, wave = small.stream(), noise(20_000)
    first = stream.push(wave[:7000])
    for bad in (torch.full((5,), torch.nan), torch.zeros(2, 5), torch.zeros(5).int()):
        with pytest.raises(UserError):
            stream.push(bad)
    codes = torch.cat([first, stream.push(wave[7000:]), stream.flush()])
    assert torch.equal(codes, small.encode(wave[None])[0])


@pytest.mark.parametrize(
    "wave", [torch.zeros(1, 1), torch.zeros(1, 9000), torch.ones(1, 3000), noise(1, 3000) * 1e30]
)
def test_tiny_silent_and_clipped_waves_are_sound_like_any(
    small: SpeechCodec, wave: torch.Tensor
) -> None:
    codes = small.encode(wave)
    assert codes.shape == (1, -(-wave.shape[1] // 1280), 1)
    assert torch.equal(codes, small.encode(wave.clamp(-1, 1)))
    made = small.decode(codes)
    assert torch.isfinite(made).all()
    assert made.shape == (1, 1280 * codes.shape[1])


def test_latency_is_a_block_and_thirty_milliseconds(codec: SpeechCodec) -> None:
    block = codec.config.block
    assert codec.latency == pytest.approx(0.08 * block + 0.03)
    stream, decoder = codec.stream(), codec.decode_stream()
    assert len(stream.push(torch.zeros(codec.block_samples - 1))) == 0
    codes = stream.push(torch.zeros(1))
    assert len(codes) == block
    assert len(decoder.push(codes[:-1])) == 0
    assert len(decoder.push(codes[-1:])) == max(0, block * 1280 - 480)
    assert len(decoder.push(codes)) == block * 1280


def test_training_begins_as_k_means_of_principal_components(
    part: Callable[[type, int], Part],
) -> None:
    documents: list[list[Part]] = [[Text("a"), part(Audio, i)] for i in range(12)]
    for quantizer in (ONE, replace(ONE, num_codebooks=3), SHAPES["fsq, no context"].quantizer):
        config = SpeechCodecConfig(quantizer=quantizer, width=16, num_layers=1, num_heads=2)
        objective = SpeechObjective(
            CodecRecipe(kind="speech", shards=(), augment=False, speech=config), documents
        )
        codec = objective.codec.eval()
        mel = objective.batch(np.random.default_rng(0), 8)["mel"]
        made = codec.decode_mel(codec.quantizer(codec.encode_features(mel)).latents)
        plain = mel.mean((0, 1))
        assert (made - mel).square().mean() < 0.7 * (plain - mel).square().mean()


def test_varied_voices_are_a_pure_function_and_move_what_they_say() -> None:
    tone = log_mel(torch.sin(torch.arange(16_000) * 2 * torch.pi * 2000 / 16_000)[None] * 0.3)[0]
    assert torch.equal(warp(tone, 1.0), tone)
    band = [int(warp(tone, ratio)[50].argmax()) for ratio in (0.9, 1.0, 1.1)]
    assert band[0] > band[1] > band[2]  # a longer tract lowers
    again = [vary(tone, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert torch.equal(again[0], again[1])
    assert again[0].shape != again[2].shape
    lengths = {len(vary(tone, np.random.default_rng(seed))) for seed in range(40)}
    assert 84 <= min(lengths) < 90
    assert 112 < max(lengths) <= 118
    silent = vary(torch.full((3, 80), SILENCE), np.random.default_rng(0))
    assert silent.min() >= SILENCE


def test_overlapping_windows_add_up_to_the_wave() -> None:
    wave = noise(40 * HOP)
    padded = torch.nn.functional.pad(wave, (WINDOW - HOP, 0))
    window = torch.hann_window(WINDOW)
    frames = padded.unfold(0, WINDOW, HOP) * window
    made = overlap_add(frames * window) / overlap_weight(len(frames), wave.device).clamp(min=1e-3)
    assert torch.allclose(made[WINDOW:-WINDOW], padded[WINDOW : len(made) - WINDOW], atol=1e-5)


def test_a_learned_vocoder_streams_what_it_computes_whole() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = WaveHead(12).eval()
    mel = log_mel(noise(1, 60 * HOP))
    whole = head(mel)[0].clamp(-1, 1)
    stream = head.stream()
    pieces = torch.cat([stream.push(piece) for piece in mel.split(20, dim=1)])
    assert torch.allclose(pieces, whole[: 60 * HOP], atol=1e-5)
    assert pieces.abs().max() > 0
    late = torch.cat([mel[:, :40], mel[:, :20]], dim=1)
    assert torch.equal(head(late)[0, : 40 * HOP], head(mel)[0, : 40 * HOP])


def test_a_learned_vocoder_learns() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = WaveHead(16, num_layers=1)
    steps = torch.arange(4 * 12_800).reshape(4, -1)
    wave = 0.3 * torch.sin(steps * torch.tensor([[0.06], [0.08], [0.11], [0.15]]))
    optimizer, losses = torch.optim.AdamW(head.parameters(), lr=3e-3), []
    for _ in range(12):
        loss = wave_loss(head, wave)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_griffin_lim_gives_back_the_frames_it_is_given() -> None:
    time = torch.arange(4 * 12_800) / 16_000
    wave = sum(torch.sin(2 * torch.pi * 150 * k * time) / k for k in range(1, 20)) * 0.1
    mel = log_mel(wave[None])
    vocoder = GriffinLim(80, torch.device("cpu"))
    made = torch.cat([vocoder.push(block) for block in mel.split(80, dim=1)])
    again = log_mel(made[None, GriffinLim.DELAY :])
    assert (again[:, 8:-8] - mel[:, 8 : again.shape[1] - 8]).abs().mean() < 0.15


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_their_sources_say(name: str) -> None:
    source, config = PRESETS[name]
    assert source
    narrow = replace(
        config,
        quantizer=replace(config.quantizer, width=4, codebook_size=32),
        width=16,
        num_layers=1,
        num_heads=2,
    )
    codec = build(narrow)
    wave = noise(1, 4000)
    codes = codec.encode(wave)
    assert codes.shape == (1, 4, config.quantizer.num_codebooks)
    assert codec.decode(codes).shape == (1, 4 * 1280)
    bits = {"glm-4-voice": 175, "mimi": 1100, "speech-512": 112.5, "speech-1k": 125}
    size, count = config.quantizer.codebook_size, config.quantizer.num_codebooks
    if name in bits:
        assert 12.5 * count * np.log2(size) == bits[name]
    assert codec.bits_per_second == 12.5 * count * 5


def test_a_config_of_the_first_format_is_read_as_it_was_meant() -> None:
    old = {"codebook_size": 64, "code_width": 8, "width": 32, "context": 10}
    new = SpeechCodec.upgrade(old, 1)
    assert new == {
        "width": 32,
        "context": 10,
        "quantizer": {"kind": "ema", "codebook_size": 64, "width": 8},
    }
    assert SpeechCodec.upgrade(new, 2) == new
