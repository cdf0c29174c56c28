"""Parts: whatever people have is read upright and in range, the rest is refused in one line."""

import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt import media, sound
from mmpt.config import UserError
from mmpt.parts import Audio, Image, Text, Video, load_part

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def picture(height: int = 12, width: int = 20, seed: int = 0) -> np.ndarray:
    """Smooth colours, so that lossy formats keep them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / rng.uniform(4, 9) + y / 6 + rng.uniform(0, 6)) for _ in range(3)]
    return ((np.stack(waves, -1) + 1) * 127).astype(np.uint8)


def clip(num_frames: int = 5, height: int = 12, width: int = 20) -> np.ndarray:
    return np.stack([picture(height, width, seed) for seed in range(num_frames)])


def tone(seconds: float = 0.25, rate: int = 16_000, *, hertz: float = 440.0) -> np.ndarray:
    places = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * places)).astype(np.float32)


def encoded(picture: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def sound_file(wave: np.ndarray, rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def refused(call: Callable[[], Any], match: str | None = None) -> None:
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert is_one_line(caught.value)


def is_one_line(error: UserError) -> bool:
    return "\n" not in str(error) and "object at 0x" not in str(error)


def attempt(load: Callable[[bytes], Any], data: bytes) -> None:
    """Either way is fine, as long as it is clean."""
    try:
        load(data)
    except UserError as error:
        if not is_one_line(error):
            raise AssertionError(str(error)) from error


# pictures


@pytest.mark.parametrize("kind", ["png", "webp", "jpg", "bmp"])
@pytest.mark.parametrize(("height", "width"), [(12, 20), (13, 7), (1, 1)])
def test_a_saved_picture_comes_back(tmp_path: Path, kind: str, height: int, width: int) -> None:
    pixels = picture(height, width)
    Image(pixels).save(tmp_path / f"a.{kind}")
    loaded = Image.load(tmp_path / f"a.{kind}").pixels
    assert loaded.shape == pixels.shape
    if kind in ("png", "bmp"):
        assert np.array_equal(loaded, pixels)
    assert np.abs(loaded.astype(int) - pixels).mean() < 16


def test_a_palette_gives_its_colours() -> None:
    indexed = PIL.Image.new("P", (4, 3))
    indexed.putpalette([0, 0, 0, *RED, *GREEN])
    indexed.putdata([2] * 12)
    for kind in ("png", "gif"):
        assert (Image.load(encoded(indexed, kind)).pixels == GREEN).all()
    indexed.putpixel((0, 0), 1)
    seen = Image.load(encoded(indexed, "png", transparency=2)).pixels
    assert tuple(seen[0, 0]) == RED
    assert (seen.reshape(-1, 3)[1:] == WHITE).all()


def test_alpha_is_composited_on_white() -> None:
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    pixels[0, 1] = (255, 0, 0, 0)
    pixels[1, 0] = (255, 0, 0, 128)
    seen = Image.load(encoded(PIL.Image.fromarray(pixels), "png")).pixels
    assert tuple(seen[0, 0]) == RED
    assert tuple(seen[0, 1]) == tuple(seen[1, 1]) == WHITE
    assert abs(int(seen[1, 0, 1]) - 127) <= 1
    grey = PIL.Image.new("LA", (2, 2), (10, 0))
    assert (Image.load(encoded(grey, "png")).pixels == 255).all()
    keyed = PIL.Image.new("RGB", (2, 2), RED)
    assert (Image.load(encoded(keyed, "png", transparency=RED)).pixels == 255).all()


@pytest.mark.parametrize(("kind", "top"), [("png", 65535), ("tiff", 65535), ("png", 200)])
def test_16_bits_keep_their_high_byte_however_dark(kind: str, top: int) -> None:
    values = np.linspace(0, top, 30).astype(np.uint16).reshape(5, 6)
    seen = Image.load(encoded(PIL.Image.fromarray(values), kind)).pixels
    assert np.abs(seen[..., 0].astype(int) - values // 256).max() <= 1


def test_other_modes_are_read() -> None:
    floats = PIL.Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4))
    assert Image.load(encoded(floats, "tiff")).pixels.max() == 255
    holes = np.full((3, 4), np.nan, dtype=np.float32)
    assert (Image.load(encoded(PIL.Image.fromarray(holes), "tiff")).pixels == 0).all()
    bits = PIL.Image.fromarray(np.eye(4, dtype=bool))
    assert np.array_equal(
        Image.load(encoded(bits, "png")).pixels[..., 0] > 0, np.eye(4, dtype=bool)
    )
    inks = PIL.Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    assert (Image.load(encoded(inks, "jpeg")).pixels > 250).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotated_pictures_stand_upright(orientation: int) -> None:
    pixels = picture(8, 16)
    flips: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    for kind in ("png", "webp"):
        data = encoded(PIL.Image.fromarray(pixels), kind, exif=exif, lossless=True)
        assert np.array_equal(Image.load(data).pixels, flips[orientation](pixels))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "tiff"])
def test_an_undecodable_picture_is_refused(tmp_path: Path, kind: str) -> None:
    data = encoded(PIL.Image.fromarray(picture(40, 40)), kind)
    path = tmp_path / f"cat.{kind}"
    for broken in (data[: len(data) // 2], data[:20], b"", b"no picture at all", bytes(99)):
        path.write_bytes(broken)
        refused(lambda: Image.load(path), match="cat")
        refused(lambda broken=broken: Image.load(broken), match="the data is")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for load in (Image.load, Video.load, Audio.load, Text.load, load_part):
        refused(lambda load=load: load(tmp_path / "absent.png"), match="No such file")
        refused(lambda load=load: load(tmp_path), match="directory")
        refused(lambda load=load: load("a\0b.png"), match="cannot read")


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises a giant."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [9000, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(media, "_to_rgb", never)
    monkeypatch.setattr(media, "_read_film", never)  # another decoder must not try either
    for load in (Image.load, Video.load):
        refused(lambda load=load: load(png_that_claims(side, side)), match="pixels.*shrink it")


def test_an_animation_with_too_many_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_VIDEO_BYTES", 4 * 12 * 20 * 3)
    for suffix in (".webp", ".gif", ".mp4"):
        data = media.video_bytes(clip(5), 10.0, suffix)
        refused(lambda data=data: Video.load(data), match="cut or shrink it")
        assert len(Video.load(data, max_frames=4).frames) == 4


def test_a_film_of_giant_frames_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = media.video_bytes(clip(2, 64, 64), 10.0)
    monkeypatch.setattr(media, "MAX_PIXELS", 64 * 64 - 1)
    refused(lambda: Video.load(data))


# video


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
@pytest.mark.parametrize(("height", "width"), [(12, 20), (13, 7), (1, 1)])
def test_a_saved_clip_comes_back(tmp_path: Path, suffix: str, height: int, width: int) -> None:
    path = tmp_path / f"a{suffix}"
    frames = clip(5, height, width)
    Video(frames, 10.0).save(path)
    loaded = Video.load(path)
    # H.264 halves the colour's sides, so odd ones grow by one pixel
    grown = suffix == ".mp4"
    assert loaded.frames.shape == (5, height + grown * (height % 2), width + grown * (width % 2), 3)
    assert loaded.fps == pytest.approx(10.0)
    error = np.abs(loaded.frames[:, :height, :width].astype(int) - frames).mean()
    assert error == 0 if suffix == ".webp" else error < 24


@pytest.mark.parametrize("fps", [0.01, 7.5, 24000 / 1001, 1000.0])
def test_any_frame_rate_is_kept_by_mp4(fps: float) -> None:
    loaded = Video.load(media.video_bytes(clip(4), fps, ".mp4"))
    assert len(loaded.frames) == 4
    assert loaded.fps == pytest.approx(fps, rel=1e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
@pytest.mark.parametrize("order", [(0, 0, 1, 1, 0), (0, 1, 1, 1, 2), (0, 1, 2, 2, 2)])
def test_a_clip_with_equal_frames_keeps_their_number(suffix: str, order: tuple[int, ...]) -> None:
    frames = clip(3)[list(order)]
    loaded = Video.load(media.video_bytes(frames, 10.0, suffix))
    assert len(loaded.frames) == 5
    assert loaded.fps == pytest.approx(10.0)
    if suffix == ".webp":
        assert np.array_equal(loaded.frames, frames)


def test_a_frame_that_is_held_is_repeated_unless_that_is_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, *rest = [PIL.Image.fromarray(frame) for frame in clip(3)]
    data = encoded(first, "gif", save_all=True, append_images=rest, duration=[100, 300, 100])
    held = Video.load(data)
    assert len(held.frames) == 5
    assert held.fps == pytest.approx(10.0)
    assert len(Video.load(data, max_frames=2).frames) == 2
    monkeypatch.setattr(media, "MAX_VIDEO_BYTES", 3 * 12 * 20 * 3)
    assert len(Video.load(data).frames) == 3


def test_a_one_frame_gif_is_an_image_and_also_a_clip_of_one_frame(tmp_path: Path) -> None:
    path = tmp_path / "still.gif"
    Image(picture()).save(path)
    part = load_part(path)
    assert isinstance(part, Image)
    assert part.pixels.shape == (12, 20, 3)
    assert Video.load(path).frames.shape == (1, 12, 20, 3)


def test_a_truncated_film_is_refused_or_keeps_what_came_before() -> None:
    data = media.video_bytes(clip(30, 64, 64), 10.0)
    for size in (0, 20, len(data) // 2, data.index(b"moov")):  # an MP4 ends with its index
        refused(lambda size=size: Video.load(data[:size]))
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = cast(Any, container.add_stream("mpeg4", rate=25))
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in clip(30, 64, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    whole = buffer.getvalue()
    assert len(Video.load(whole).frames) == 30
    assert 0 < len(Video.load(whole[: len(whole) // 2]).frames) < 30


def test_no_film_is_refused(tmp_path: Path) -> None:
    refused(lambda: Video.load(sound_file(tone(), 16_000)), match="no video stream|no picture")
    refused(lambda: Video.load(b"hello"), match="no picture or film")
    refused(lambda: Video.load(b""), match="no picture or film")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n"
    refused(lambda: Video.load(playlist.encode()), match="no picture or film")
    # words in a path are not taken for words of an error
    folder = tmp_path / "no picture"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(PIL.Image.fromarray(picture(40, 40)), "png")[:200])
    refused(lambda: Video.load(folder / "a.png"), match="broken picture")


def test_pages_of_different_sizes_are_refused() -> None:
    first, second = (PIL.Image.fromarray(picture(h, 8)) for h in (8, 9))
    data = encoded(first, "tiff", save_all=True, append_images=[second])
    refused(lambda: Video.load(data), match="changes its size at frame 2")
    assert Image.load(data).pixels.shape == (8, 8, 3)


def test_a_film_that_a_phone_held_upright_stands_upright() -> None:
    frames = clip(3, 32, 64)
    data = media.video_bytes(frames, 10.0)
    place = data.index(b"tkhd") + 4 + 40
    assert data[place : place + 36] == struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    matrix = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 32 << 16, 0, 1 << 30)  # clockwise
    turned = Video.load(data[:place] + matrix + data[place + 36 :]).frames
    assert turned.shape == (3, 64, 32, 3)
    upright = np.rot90(Video.load(data).frames, -1, axes=(1, 2))
    assert np.array_equal(turned, upright)


def test_a_clip_is_not_written_under_a_name_of_another_kind(tmp_path: Path) -> None:
    for name in ("a.png", "a.wav", "a.avi"):
        refused(lambda name=name: Video(clip(), 10.0).save(tmp_path / name), match="use .mp4")
    for name in ("a.mp4", "a.xyz"):
        refused(lambda name=name: Image(picture()).save(tmp_path / name), match="use .png")
        refused(lambda name=name: Audio(tone(), 8000).save(tmp_path / name), match="use .wav")
    assert list(tmp_path.iterdir()) == []


# sound


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_U8"),
        ("WAV", "PCM_24"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
def test_a_sound_of_any_format_is_read(kind: str, subtype: str) -> None:
    wave = tone(0.5)
    loaded = Audio.load(sound_file(wave, 16_000, kind, subtype))
    assert loaded.sample_rate == 16_000
    assert loaded.wave.dtype == np.float32
    assert loaded.seconds == pytest.approx(0.5, abs=0.1)
    strongest = np.abs(np.fft.rfft(loaded.wave)).argmax() / loaded.seconds
    assert strongest == pytest.approx(440, abs=5)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_saved_sound_comes_back(tmp_path: Path, suffix: str) -> None:
    Audio(tone(), 16_000).save(tmp_path / f"a{suffix}")
    loaded = Audio.load(tmp_path / f"a{suffix}")
    assert np.abs(loaded.wave - tone()).max() < 1e-4
    part = load_part(tmp_path / f"a{suffix}")
    assert isinstance(part, Audio)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_samples_of_16_bits_come_back_exactly(suffix: str) -> None:
    wave = np.arange(-32_768, 32_768, dtype=np.float32) / 32_768
    again = Audio.load(sound.sound_bytes(wave, 16_000, suffix)).wave
    assert np.array_equal(again, wave)


def test_channels_are_averaged() -> None:
    stereo = np.stack([tone(), -tone() / 2], axis=1)
    loaded = Audio.load(sound_file(stereo, 16_000, "WAV", "FLOAT"))
    assert loaded.wave.shape == (4000,)
    assert np.abs(loaded.wave - tone() / 4).max() < 1e-6


@pytest.mark.parametrize(
    "rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 22_254, 44_056, 47_952, 12_345, 44_099]
)
def test_any_rate_becomes_16_khz(rate: int) -> None:
    made = Audio.load(sound_file(tone(0.25, rate), rate)).resample(16_000)
    assert made.sample_rate == 16_000
    assert len(made.wave) == pytest.approx(4000, abs=2)
    middle = slice(500, 3500)
    assert np.abs(made.wave[middle] - tone()[middle]).max() < 0.02


def test_one_sample_is_enough() -> None:
    for rate in (1000, 8_000, 96_000, 383_999):
        assert len(Audio(np.zeros(1, np.float32), rate).resample(16_000).wave) >= 1


def test_a_rate_that_no_sound_has_is_refused() -> None:
    refused(lambda: Audio(tone(), 16_000).resample(0), match="the result has 0 samples a second")


def test_empty_undecodable_and_endless_sound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: Audio.load(sound_file(np.zeros(0, np.float32), 16_000)), match="no samples")
    flac = sound_file(tone(), 16_000, "FLAC")
    for broken in (b"", b"hello there", flac[:30], bytes(1000)):
        refused(lambda broken=broken: Audio.load(broken), match=r"no sound|no samples")
    refused(lambda: Audio.load(sound_file(tone(), 500)), match="500 samples a second")
    monkeypatch.setattr(sound, "MAX_SECONDS", 1)
    refused(lambda: Audio.load(sound_file(tone(1.1), 16_000)), match="longer than 1 s")
    assert Audio.load(sound_file(tone(1.0), 16_000)).seconds == 1.0
    monkeypatch.setattr(sound, "MAX_SAMPLES", 100)
    refused(lambda: Audio.load(sound_file(tone(0.5), 16_000)), match="longer than")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_samples_are_refused(value: float) -> None:
    wave = tone()
    wave[7] = value
    refused(lambda: Audio(wave, 16_000), match="NaN or infinite")
    refused(lambda: Audio.load(sound_file(wave, 16_000, "WAV", "FLOAT")), match="NaN or infinite")


def test_a_sound_that_is_too_loud_is_clipped() -> None:
    loaded = Audio.load(sound_file(tone() * 4, 16_000, "WAV", "FLOAT"))
    assert np.abs(loaded.wave).max() == 1.0


def test_a_broken_sound_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    flac = bytearray(sound_file(tone(), 16_000, "FLAC"))
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(flac)
        for place in rng.integers(len(data), size=6):
            data[place] = rng.integers(256)
        attempt(Audio.load, bytes(data))
    assert "Traceback" not in capfd.readouterr().err


# text, and all of them


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    Text("a \u00e9 \U0001f34e\n").save(path)
    assert load_part(path) == Text("a \u00e9 \U0001f34e\n")
    path.write_bytes(b"\xef\xbb\xbfwith a mark")
    assert load_part(path) == Text("with a mark")
    path.write_bytes(b"caf\xe9")
    refused(lambda: load_part(path), match="not UTF-8 at byte 3")
    refused(lambda: Text("bad \udcff").save(path), match="lone surrogate at character 4")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Image(np.zeros((4, 4), np.uint8)), "uint8 array"),
        (lambda: Image(np.zeros((4, 4, 4), np.uint8)), "uint8 array"),
        (lambda: Image(np.zeros((0, 4, 3), np.uint8)), "not empty"),
        (lambda: Image(np.zeros((4, 4, 3), np.float32)), "got float32"),
        (lambda: Image(cast(Any, [[1, 2, 3]])), "got list"),
        (lambda: Video(np.zeros((4, 4, 3), np.uint8), 10.0), "uint8 array"),
        (lambda: Video(np.zeros((0, 4, 4, 3), np.uint8), 10.0), "not empty"),
        (lambda: Video(np.zeros((1, 4, 4, 3), np.uint8), 0.0), "fps"),
        (lambda: Video(np.zeros((1, 4, 4, 3), np.uint8), float("nan")), "fps"),
        (lambda: Audio(np.zeros(4), 16_000), "got float64"),
        (lambda: Audio(np.zeros(0, np.float32), 16_000), "not empty"),
        (lambda: Audio(np.zeros((2, 4), np.float32), 16_000), "float32 array"),
        (lambda: Audio(np.zeros(4, np.float32), 10), "samples a second"),
    ],
)
def test_a_part_of_a_wrong_shape_type_or_rate_is_refused(
    make: Callable[[], Any], match: str
) -> None:
    refused(make, match=match)


def test_load_part_goes_by_the_suffix_of_any_case(tmp_path: Path) -> None:
    Image(picture()).save(tmp_path / "a.PNG")
    Video(clip(), 10.0).save(tmp_path / "a.WebP")
    Video(clip(), 10.0).save(tmp_path / "a.MP4")
    Audio(tone(), 16_000).save(tmp_path / "a.WAV")
    kinds = [type(load_part(tmp_path / f"a.{s}")) for s in ("PNG", "WebP", "MP4", "WAV")]
    assert kinds == [Image, Video, Video, Audio]
    (tmp_path / "a.png").write_bytes((tmp_path / "a.WAV").read_bytes())
    refused(lambda: load_part(tmp_path / "a.png"), match="no picture")


FILES: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
    **{
        kind: (encoded(PIL.Image.fromarray(picture(24, 24)), kind), Image.load)
        for kind in ("png", "jpeg", "webp", "gif", "tiff", "bmp")
    },
    **{
        suffix: (media.video_bytes(clip(4), 10.0, suffix), Video.load)
        for suffix in (".mp4", ".webp", ".gif")
    },
    **{kind: (sound_file(tone(), 16_000, kind), Audio.load) for kind in ("WAV", "FLAC", "OGG")},
}


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    cut=st.floats(0, 1),
)
def test_a_damaged_file_is_read_or_refused_in_one_line(
    name: str, changes: list[tuple[float, int]], cut: float
) -> None:
    whole, load = FILES[name]
    data = bytearray(whole)
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    if not changes:
        data = data[: int(cut * len(data))]
    attempt(load, bytes(data))


def test_notebooks_show_what_files_hold() -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    shown = Image(pixels, provenance=lambda: "how it was made")._repr_png_()
    assert np.array_equal(Image.load(shown).pixels, pixels)
    assert b"how it was made" not in shown
    wave = np.linspace(-0.5, 0.5, 160, dtype=np.float32)
    page = Audio(wave, 16_000)._repr_html_()
    data = page.removeprefix('<audio controls src="data:audio/wav;base64,').split('"')[0]
    assert np.allclose(Audio.load(base64.b64decode(data)).wave, wave, atol=1e-4)
    page = Video(np.stack([pixels, pixels[::-1]]), 8.0)._repr_html_()
    data = page.removeprefix('<img src="data:image/webp;base64,').split('"')[0]
    assert len(Video.load(base64.b64decode(data)).frames) == 2
