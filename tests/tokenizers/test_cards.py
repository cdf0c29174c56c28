"""The measures behind a report card: counts, baselines, vocoding, distances, judged sentences."""

import math

import pytest
import torch
from torch import Tensor

from mmpt.config import UserError
from mmpt.data.shards import Document
from mmpt.parts import Audio, Image, Text, Video
from mmpt.tokenizers.cards import speech, visual, words
from mmpt.tokenizers.cards.baseline import MAX_CENTRES, CubeKMeans, KMeans
from mmpt.tokenizers.cards.speech import Utterance, griffin_lim, spectral_distance
from mmpt.tokenizers.cards.system import System, Tally
from mmpt.tokenizers.image import ImageCodec, ImageCodecConfig, from_pixels
from mmpt.tokenizers.quantize import QuantizerConfig
from mmpt.tokenizers.vocoder import log_mel


def tally(media: list[Tensor], *, sizes: tuple[int, ...], decode=lambda codes: codes) -> Tally:
    counted = Tally(System(name="x", encode=lambda m: m, decode=decode, sizes=sizes))
    for medium in media:
        counted.keep(medium)
    return counted


# counts


def test_codes_are_counted_over_all_media() -> None:
    media = [torch.tensor([[0], [1]]), torch.tensor([[1], [2], [2], [0]])]
    counted = tally(media, sizes=(8,))
    block = counted.metrics(3.0)
    assert counted.bits == 6 * 3
    assert block["usage"] == 3 / 8
    assert block["dead"] == 5
    assert block["perplexity"] == pytest.approx(3.0)  # three codes, equally often
    assert block["identity"] == 1


def test_every_codebook_is_counted_alone() -> None:
    codes = torch.tensor([[0, 3], [1, 3], [2, 3], [3, 3]])
    block = tally([codes], sizes=(4, 4)).metrics(1.0)
    assert block["usage"] == 5 / 8
    assert block["perplexity"] == pytest.approx((4 + 1) / 2)


def test_identity_is_the_share_of_codes_that_come_back() -> None:
    media = [torch.tensor([[0], [1], [2], [3]])]
    block = tally(media, sizes=(4,), decode=lambda codes: codes.clamp(max=2)).metrics(1.0)
    assert block["identity"] == 3 / 4


def test_a_ceiling_has_no_codes_to_count() -> None:
    block = tally([torch.randn(4)], sizes=()).metrics(1.0)
    assert set(block.values()) == {None}


# baselines


def test_a_second_stage_codes_what_the_first_left() -> None:
    points = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0))
    errors = []
    for depth in (1, 2, 3):
        centres = KMeans.fit([points[:900], points[900:]], 16, depth)
        codes = centres.encode(points)
        assert codes.shape == (2000, depth)
        errors.append(float((centres.decode(codes) - points).square().mean()))
    assert errors[0] > errors[1] > errors[2]


def test_a_codebook_too_large_for_k_means_is_split_at_equal_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmpt.tokenizers.cards.baseline.MAX_CENTRES", 32)
    centres = KMeans.fit([torch.randn(500, 4)], 1024)
    assert centres.sizes == (32, 32)
    assert sum(map(math.log2, centres.sizes)) == 10
    assert MAX_CENTRES >= 2048  # the codecs here are compared with one stage


def test_cubes_come_back_where_they_were() -> None:
    generator = torch.Generator().manual_seed(0)
    # 8 different flat colours a clip: as many centres can say them exactly
    clips = [torch.rand(9, 3, 2, 3, generator=generator) for _ in range(2)]
    clips = [clip.repeat_interleave(8, 2).repeat_interleave(8, 3) for clip in clips]
    clips = [torch.cat([clip[:1], clip[1::4].repeat_interleave(4, 0)]) for clip in clips]
    cubes = CubeKMeans(factor=8, group=4)
    cubes.fit(clips, 12, 1)
    codes = cubes.encode(clips[0])
    assert codes.shape == (3, 2, 3, 1)
    assert cubes.sizes == (24,)
    assert cubes.bits == math.log2(12)
    assert (codes[0] < 12).all()
    assert (codes[1:] >= 12).all()
    made = cubes.decode(codes)
    assert made.shape == clips[0].shape
    assert torch.allclose(made[:1], clips[0][:1], atol=1e-5)
    assert float((made - clips[0]).square().mean()) < float(clips[0].var())


# pictures


def test_padding_is_not_measured() -> None:
    codec = ImageCodec(ImageCodecConfig(encoder_width=16, decoder_width=16, decoder_blocks=1))
    codec.eval()
    rng = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 41, 50, generator=rng) * 2 - 1
    part = Image(from_pixels(pixels)[0])
    train = [Image(from_pixels(torch.rand(1, 3, 256, 256, generator=rng) * 2 - 1)[0])]
    blocks = visual.measure_visual(codec, [[part]], [list(train)])
    [clip] = visual._pictures([[part]], 8)
    made = codec.decode(codec.encode(clip.pixels))[..., :41, :50]
    error = (made - clip.pixels[..., :41, :50]).square().mean()
    assert blocks[""]["psnr"] == pytest.approx(float(10 * torch.log10(4 / error)), abs=1e-3)
    assert blocks[""]["bits_per_pixel"] == pytest.approx(9 / 64)


def test_a_ceiling_is_what_a_fine_grid_comes_near_to() -> None:
    rng = torch.Generator().manual_seed(0)
    part = Image(from_pixels(torch.rand(1, 3, 64, 64, generator=rng) * 2 - 1)[0])
    [clip] = visual._pictures([[part]], 8)
    away = []
    for level in (2, 20_001):
        torch.manual_seed(0)
        quantizer = QuantizerConfig(kind="fsq", levels=(level,) * 3)
        settings = ImageCodecConfig(
            quantizer=quantizer, encoder_width=16, decoder_width=16, decoder_blocks=1
        )
        codec = ImageCodec(settings).eval()
        made = codec.decode(codec.encode(clip.pixels))
        with torch.inference_mode():
            away.append(float((visual._ceiling(codec).decode(clip.pixels) - made).abs().max()))
    assert away[0] > 20 * away[1] > 0


def test_a_tail_of_frames_is_filled_and_not_measured() -> None:
    frames = from_pixels(torch.rand(7, 3, 20, 16) * 2 - 1)
    [clip] = visual._clips([[Video(frames, 10.0)]], 8)
    assert clip.pixels.shape == (9, 3, 24, 16)
    assert torch.equal(clip.pixels[6], clip.pixels[8])
    assert clip.crop(clip.pixels).shape == (7, 3, 20, 16)
    assert clip.seconds == pytest.approx(0.7)


# sound


def chirp(seconds: float = 1.0) -> Tensor:
    """Rising and falling, louder and quieter, so that a shift in time shows."""
    time = torch.arange(int(16_000 * seconds)) / 16_000
    phase = 2 * math.pi * (300 * time + 900 * time**2)
    return 0.3 * torch.sin(phase) * (1 + torch.sin(2 * math.pi * 4 * time)) / 2


def test_griffin_lim_gives_sound_back_in_its_place() -> None:
    wave = chirp(1.28)
    mel = log_mel(wave[None])[0]
    made = griffin_lim(mel)
    assert made.shape == wave.shape
    again = log_mel(made[None])[0]
    # frames are compared with those of the same time, of 10 ms before and of 10 ms after
    here = float((again - mel).abs().mean())
    assert here < 0.7 * float((again[1:] - mel[:-1]).abs().mean())
    assert here < 0.7 * float((again[:-1] - mel[1:]).abs().mean())
    assert here < 0.2


def test_the_spectral_distance_is_in_nats() -> None:
    wave = chirp()
    noise = torch.randn(len(wave), generator=torch.Generator().manual_seed(0))
    assert spectral_distance(wave, wave) == 0
    # loud noise is above the floor everywhere: twice as loud is log 2 away
    assert spectral_distance(0.2 * noise, 0.1 * noise) == pytest.approx(math.log(2), abs=0.02)
    near, far = (spectral_distance(wave + s * noise, wave) for s in (0.001, 0.1))
    assert near < far
    assert spectral_distance(wave[:100], wave[:100]) == 0  # shorter than a window


def test_intelligibility_is_of_sound_and_not_of_silence() -> None:
    wave = chirp()
    noise = torch.randn(len(wave), generator=torch.Generator().manual_seed(0))
    assert speech._stoi(wave, wave) == pytest.approx(1, abs=1e-3)
    noisy = speech._stoi(wave + noise, wave)
    assert noisy is not None
    assert noisy < 0.7
    assert speech._stoi(torch.zeros(16_000), torch.zeros(16_000)) is None
    assert speech._stoi(wave[:3000], wave[:3000]) is None


def test_visqol_hears_that_noise_is_worse() -> None:
    pytest.importorskip("visqol")
    wave = chirp(1.0)
    noise = torch.randn(len(wave), generator=torch.Generator().manual_seed(0))
    clean, noisy = (speech._visqol([(wave + s * noise, wave)], "x") for s in (0.0, 0.1))
    assert clean is not None
    assert noisy is not None
    assert 1 <= noisy < clean <= 5
    assert speech._visqol([(wave[:100], wave[:100])], "x") is None


def test_every_sound_has_the_one_text_of_its_document_and_its_voice() -> None:
    wave = torch.zeros(160).numpy()
    sounds = [Audio(wave, 16_000), Audio(wave, 8_000)]
    found = speech.utterances(
        [
            Document("a", "a", "any", [Text("one"), *sounds], "digits", voices=("anna", "")),
            Document("b", "b", "any", [Text("one"), Text("two"), sounds[0]]),
        ]
    )
    assert [(u.text, u.voice, u.source) for u in found] == [
        ("one", "anna", "digits"),
        ("one", "", "digits"),
        ("", "", ""),
    ]
    assert [len(u.wave) for u in found] == [160, 320, 160]


# judged sentences


def said(text: str, voice: str, source: str = "digits") -> Utterance:
    return Utterance(torch.zeros(1600), text, voice, source)


def test_where_unseen_voices_speak_their_data_set_is_judged() -> None:
    heldout = [
        said("one", "anna"),
        said("two", "ben"),
        said("", "ben"),
        said("three", "cleo", "prompts"),
        said("xqzzt", "anna"),
    ]
    picks, notes = words.judged(heldout, ["ben"])
    assert picks == [0, 1]
    assert notes == ["word error rate: 1 texts with words that the judge does not know"]
    picks, notes = words.judged(heldout, ["dora"])
    assert picks == [0, 1, 3]
    assert "no voice is known to be unseen" in notes[-1]
    assert words.judged(heldout, ["ben"], whisper="folder")[0] == [0, 1, 4]


def test_errors_are_split_by_voice_and_compared_on_the_same_sentences() -> None:
    heldout = [said("one two three", "anna"), said("two one", "ben"), said("three", "cleo")]
    generator = torch.Generator().manual_seed(0)
    silence = [u.wave for u in heldout]
    noise = [0.1 * torch.randn(8000, generator=generator) for _ in heldout]
    waves = {"": silence, "baseline": noise, "ceiling": silence}
    rows = words.by_voice([u.voice for u in heldout], ["ben"], ["anna"])
    blocks = words.measure_words(waves, [u.text for u in heldout], [0, 1, 2], rows)
    ours, baseline = blocks[""], blocks["baseline"]
    assert set(ours) == set(words.silent())
    assert (ours["judged"], ours["judged_seen"], ours["judged_unseen"]) == (3, 1, 1)
    for group in words.GROUPS:
        difference = ours[f"{group}_minus_baseline"]
        assert isinstance(difference, list)
        assert difference[1] == pytest.approx(ours[group] - baseline[group])
        assert ours[f"{group}_minus_ceiling"] == [0, 0, 0]


def test_a_voice_is_seen_when_it_spoke_in_training_and_unseen_when_it_is_named() -> None:
    rows = words.by_voice(["anna", "ben", "cleo", ""], ["ben"], ["anna"])
    assert rows == {"wer": [0, 1, 2, 3], "wer_seen": [0], "wer_unseen": [1]}


def test_an_unseen_voice_in_the_training_shards_is_refused() -> None:
    words.check_unseen(["ben"], ["anna"])
    with pytest.raises(UserError, match="unseen_voices names ben, but the shards to train on"):
        words.check_unseen(["ben"], ["anna", "ben"])
