"""A note inside a media file: ASCII text that players and viewers pass over.

PNG has it in a compressed text chunk, WebP in its EXIF description, WAV in a RIFF chunk of its own,
MP4 in its comment. Other formats have no room for it, or too little.
"""

import struct
from typing import TYPE_CHECKING, Any

from mmpt.config import UserError

if TYPE_CHECKING:
    import PIL.Image

NAME = "mmpt"  # of text and RIFF chunks
MAX_NOTE = 1_000_000  # bytes; Pillow opens no PNG that has more in one chunk
DESCRIPTION = 0x010E  # the tag of EXIF
NOTED = (".png", ".webp", ".wav", ".mp4")


def picture_options(kind: str, note: str) -> dict[str, Any]:
    """What `PIL.Image.Image.save` takes to write a note; nothing for formats without."""
    import PIL.Image
    import PIL.PngImagePlugin

    if note and kind == "png":
        chunks = PIL.PngImagePlugin.PngInfo()
        chunks.add_itxt(NAME, _checked(note), zip=True)
        return {"pnginfo": chunks}
    if note and kind == "webp":
        exif = PIL.Image.Exif()
        exif[DESCRIPTION] = _checked(note)
        return {"exif": exif}
    return {}


def picture_note(picture: "PIL.Image.Image") -> str | None:
    """The note of an open PNG or WebP."""
    note = picture.info.get(NAME) or picture.getexif().get(DESCRIPTION)
    return str(note) if note else None


def add_film_note(tags: dict[str, str], note: str) -> None:
    """To the tags of an MP4 that is being written."""
    if note:
        tags["comment"] = _checked(note)


def add_chunk(wave: bytes, note: str) -> bytes:
    """A RIFF file with one more chunk at its end; as it is for an empty note."""
    if not note:
        return wave
    body = _checked(note).encode()
    chunk = NAME.encode() + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    return wave[:4] + struct.pack("<I", len(wave) - 8 + len(chunk)) + wave[8:] + chunk


def find_chunk(wave: bytes) -> str | None:
    """The note that `add_chunk` wrote."""
    place = 12
    while place + 8 <= len(wave):
        name, size = struct.unpack_from("<4sI", wave, place)
        if name == NAME.encode():
            return wave[place + 8 : place + 8 + size].decode("ascii", "replace")
        place += 8 + size + size % 2
    return None


def _checked(note: str) -> str:
    assert note.isascii(), "EXIF has no other text"
    if len(note) > MAX_NOTE:
        raise UserError(
            f"the provenance takes {len(note):,} bytes, a media file {MAX_NOTE:,}; "
            "save the result as .json"
        )
    return note
