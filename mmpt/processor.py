"""Parts <-> local codes <-> ids: the codecs of one vocabulary, together.

Big pictures and clips are shrunk so that their longer side is `max_side` pixels; sides are rounded
to multiples of the codec's factor. What was encoded is what a model sees, so a result never claims
more detail than its codes hold.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch.nn import functional as F

from mmpt import hub
from mmpt.config import UserError, write_atomic
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.stream import Segment
from mmpt.tokenizers import load as load_codec
from mmpt.tokenizers.base import Codec
from mmpt.tokenizers.image import ImageCodec, from_pixels, to_pixels
from mmpt.tokenizers.text import TextCodec, text_ids
from mmpt.tokenizers.video import VideoCodec
from mmpt.vocab import Modality, Vocabulary

# the codecs that a newcomer starts with
DEFAULT_TOKENIZERS = ("text-2k", "image-f8", "video-f8t4", "speech-12hz")
FPS = 12.0  # of generated clips; codes do not carry time
CHUNK = 16  # frames that are shrunk at once: whole clips as floats would take gigabytes
FILE, FORMAT_VERSION = "processor.json", 1


@dataclass(frozen=True)
class ProcessorSettings:
    """What opens a processor again: names of shipped tokenizers or absolute paths of others.

    In a file, those in folders beside it are `./NAME`, so that all of it can be moved together.
    """

    tokenizers: tuple[str, ...]
    max_side: int = 64

    @classmethod
    def load(cls, folder: str | Path) -> "ProcessorSettings":
        """Read processor.json of a folder. Raises UserError in one line."""
        path = Path(folder) / FILE
        try:
            data = json.loads(path.read_text())
            version, names, side = data["format_version"], data["tokenizers"], data["max_side"]
            if version > FORMAT_VERSION:
                raise UserError(
                    f"{path} has format {version}; this mmpt reads {FORMAT_VERSION}: upgrade"
                )
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror}; mmpt encode and mmpt train write it"
            ) from None
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeError) as error:
            raise UserError(f"{path} holds no settings of a processor: {error!r}") from None
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not named or type(side) is not int:
            raise UserError(f"{path} needs a list of tokenizers and a whole max_side")
        beside = path.parent.resolve()
        return cls(tuple(str(beside / n) if n.startswith("./") else n for n in names), side)

    def save(self, folder: str | Path) -> None:
        """Write processor.json, atomically."""
        beside = Path(folder).resolve()
        names = [f"./{Path(n).name}" if Path(n).parent == beside else n for n in self.tokenizers]
        data = {"format_version": FORMAT_VERSION, **asdict(self), "tokenizers": names}
        write_atomic(Path(folder) / FILE, json.dumps(data, indent=1) + "\n")


@dataclass(frozen=True)
class Processor:
    """The vocabulary and its codecs. `max_side` in pixels."""

    vocabulary: Vocabulary
    text: TextCodec
    media: Mapping[Modality, Codec]
    max_side: int = 64

    def __post_init__(self) -> None:
        least = max([codec.factor for codec in self.media.values()], default=1)
        if self.max_side < least:
            raise UserError(f"max_side = {self.max_side} pixels; use {least} or more")

    @classmethod
    def load(
        cls,
        tokenizers: Sequence[str] = DEFAULT_TOKENIZERS,
        *,
        vocabulary: Vocabulary | str | Path | None = None,
        max_side: int = 64,
    ) -> "Processor":
        """Open codecs by name or folder and lay out (or check) their vocabulary."""
        codecs = [load_codec(name) for name in tokenizers]
        texts = [codec for codec in codecs if isinstance(codec, TextCodec)]
        if len(texts) != 1:
            raise UserError(f"a vocabulary needs exactly one text tokenizer, got {len(texts)}")
        media = {codec.modality: codec for codec in codecs if not isinstance(codec, TextCodec)}
        if len(media) != len(codecs) - 1:
            raise UserError("two tokenizers serve the same medium; give one of each")
        built = _build_vocabulary(texts[0], media)
        if isinstance(vocabulary, str | Path):
            vocabulary = Vocabulary.load(vocabulary)
        if vocabulary is not None:
            vocabulary.check(built.fingerprint, what="this set of tokenizers")
        return cls(vocabulary or built, texts[0], media, max_side)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Processor":
        """Open the processor of a model or token folder: processor.json and vocabulary.json."""
        settings = ProcessorSettings.load(folder)
        return cls.load(
            settings.tokenizers,
            vocabulary=Path(folder) / "vocabulary.json",
            max_side=settings.max_side,
        )

    @property
    def settings(self) -> ProcessorSettings:
        """What opens this processor again."""
        codecs = (self.text, *self.media.values())
        return ProcessorSettings(tuple(_reference(codec) for codec in codecs), self.max_side)

    def save_settings(self, folder: str | Path, *, codecs: bool = False) -> None:
        """Write processor.json; the vocabulary is saved by itself.

        codecs: and the codecs that are not shipped, each in a folder beside it.
        """
        every = (self.text, *self.media.values())
        names = [_save_beside(c, Path(folder)) if codecs else _reference(c) for c in every]
        if len(set(names)) < len(names):
            raise UserError(f"two tokenizers have one name ({', '.join(names)}); rename a folder")
        ProcessorSettings(tuple(names), self.max_side).save(folder)

    @property
    def separator(self) -> np.ndarray:
        """The ids between two adjacent texts: a new line."""
        return text_ids(self.text, "\n")

    def to(self, device: torch.device | str) -> "Processor":
        """This processor, whose media codecs compute there from now on."""
        for codec in self.media.values():
            codec.to(device)
        return self

    def encode_parts(self, parts: Sequence[Part]) -> list[Segment]:
        """Local codes of each part, in order. Raises UserError in one line for what cannot be."""
        [encoded] = self.encode_batch([parts])
        if isinstance(encoded, UserError):
            raise encoded
        return encoded

    def encode_batch(self, documents: Sequence[Sequence[Part]]) -> list[list[Segment] | UserError]:
        """`encode_parts` of several documents, or why one of them cannot be encoded.

        Media of equal shape go through their codec together.
        """
        made: list[list[Segment | UserError]] = []
        groups: dict[tuple[Modality, torch.Size], list[tuple[int, int, torch.Tensor]]] = {}
        for number, parts in enumerate(documents):
            made.append([])
            for place, part in enumerate(parts):
                try:
                    ready = self._prepare(part)
                except UserError as error:
                    made[-1].append(error)
                    break  # the rest of this document is not needed
                if isinstance(ready, Segment):
                    made[-1].append(ready)
                    continue
                modality, medium = ready
                made[-1].append(Segment(modality, np.zeros(0)))
                groups.setdefault((modality, medium.shape), []).append((number, place, medium))
        for (modality, _), items in groups.items():
            codes = _encode_all(self.media[modality], [medium for _, _, medium in items])
            for (number, place, _), each in zip(items, codes, strict=True):
                failed = isinstance(each, UserError)
                made[number][place] = each if failed else Segment(modality, each)
        return [_whole(document) for document in made]

    def decode_segments(self, segments: Sequence[Segment]) -> list[Part]:
        """The parts of segments; speech spans that follow each other are one sound."""
        parts: list[Part] = []
        for segment in merge_speech(segments):
            parts.append(self._decode(segment))
        return parts

    def _codec(self, modality: Modality) -> Codec:
        if modality not in self.media:
            raise UserError(f"this model has no {modality.name.lower()} tokenizer")
        return self.media[modality]

    def _prepare(self, part: Part) -> Segment | tuple[Modality, torch.Tensor]:
        """Text as codes; other media as their codec takes them, without the batch."""
        if isinstance(part, Text):
            return Segment(Modality.TEXT, text_ids(self.text, part.text))
        if isinstance(part, Image):
            codec = self._codec(Modality.IMAGE)
            pixels = to_pixels(part.pixels[None])
            fitted = fit_pixels(pixels, self.max_side, factor=codec.factor)
            return Modality.IMAGE, fitted[0]
        if isinstance(part, Video):
            codec = self._codec(Modality.VIDEO)
            side, factor = self.max_side, codec.factor
            chunks = np.split(part.frames, range(CHUNK, len(part.frames), CHUNK))
            pixels = [fit_pixels(to_pixels(chunk), side, factor=factor) for chunk in chunks]
            return Modality.VIDEO, torch.cat(pixels)
        if isinstance(part, Audio):
            codec = self._codec(Modality.SPEECH)
            return Modality.SPEECH, torch.from_numpy(part.resample(codec.sample_rate).wave)
        raise UserError(f"{type(part).__name__} is no Text, Image, Video or Audio")

    def _decode(self, segment: Segment) -> Part:
        if segment.modality == Modality.TEXT:
            return Text(self.text.decode(unflatten(segment.codes, 1)))
        codec = self._codec(segment.modality)
        [made] = codec.decode(unflatten(segment.codes, codec.num_codebooks)[None])
        if segment.modality == Modality.IMAGE:
            return Image(from_pixels(made[None])[0])
        if segment.modality == Modality.VIDEO:
            return Video(from_pixels(made), FPS)
        return Audio(made.cpu().numpy(), codec.sample_rate)


def _encode_all(codec: Codec, media: Sequence[torch.Tensor]) -> Sequence[np.ndarray | UserError]:
    """The codes of each of several media of one shape, or why it has none."""
    try:
        return list(flatten(codec.encode(torch.stack(list(media)))))
    except UserError as error:
        if len(media) == 1:
            return [error]
        return [each for medium in media for each in _encode_all(codec, [medium])]


def _whole(made: Sequence[Segment | UserError]) -> list[Segment] | UserError:
    """The segments of a document, or what was wrong with the first part that has none."""
    errors = [each for each in made if isinstance(each, UserError)]
    return errors[0] if errors else [each for each in made if isinstance(each, Segment)]


def flatten(codes: torch.Tensor) -> np.ndarray:
    """Codes (..., n, Q) of one medium, frame by frame: (..., n Q), one a position."""
    return rearrange(codes, "... n q -> ... (n q)").cpu().numpy()


def unflatten(codes: np.ndarray, num_codebooks: int) -> torch.Tensor:
    """The inverse of `flatten`: (..., n, Q). Raises UserError for what is no whole frames."""
    if codes.shape[-1] % num_codebooks:
        raise UserError(f"{codes.shape[-1]} codes are no whole frames of {num_codebooks}")
    whole = torch.from_numpy(np.ascontiguousarray(codes))
    return rearrange(whole, "... (n q) -> ... n q", q=num_codebooks)


def merge_speech(segments: Sequence[Segment]) -> list[Segment]:
    """Join speech segments that stand next to each other: one sound is many spans."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last and last.modality == segment.modality == Modality.SPEECH:
            merged[-1] = Segment(last.modality, np.concatenate([last.codes, segment.codes]))
        else:
            merged.append(segment)
    return merged


def fit_pixels(pixels: torch.Tensor, max_side: int, *, factor: int = 8) -> torch.Tensor:
    """Shrink (n, 3, H, W) to a longer side of at most `max_side`; `factor` divides the sides."""
    height, width = pixels.shape[-2:]
    scale = min(1.0, max_side / max(height, width))
    size = [max(factor, round(side * scale / factor) * factor) for side in (height, width)]
    if size == [height, width]:
        return pixels
    made = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    return made.clamp(-1, 1)


def _reference(codec: Codec) -> str:
    """The name of a shipped codec, the absolute path of another one."""
    if codec.folder is None:
        raise UserError(f"the {codec.kind} tokenizer was never saved; save it and load it by path")
    return codec.name if _is_shipped(codec.folder) else str(codec.folder)


def _save_beside(codec: Codec, folder: Path) -> str:
    """Its name where it is shipped; else where a copy of it stands from now on, in `folder`."""
    if codec.folder is not None and _is_shipped(codec.folder):
        return codec.name
    place = folder.resolve() / (codec.name or codec.kind)
    if codec.folder != place:
        codec.save(place)
        for name in ("README.md", "LICENSE"):
            if codec.folder is not None and (codec.folder / name).is_file():
                shutil.copyfile(codec.folder / name, place / name)
    return str(place)


def _is_shipped(folder: Path) -> bool:
    return hub.holds("tokenizers") and folder.parent == hub.shipped("tokenizers").resolve()


def _build_vocabulary(text: TextCodec, media: Mapping[Modality, Codec]) -> Vocabulary:
    """Image and video share the range `visual` when the video codec extends that image codec."""
    image, video = media.get(Modality.IMAGE), media.get(Modality.VIDEO)
    codebooks: list[tuple[str, int, dict[str, str], None]] = []
    for name, codec in (
        ("visual", image),
        ("video", video),
        ("speech", media.get(Modality.SPEECH)),
    ):
        if codec is None:
            continue
        made_by = {codec.modality.name.lower(): codec.fingerprint}
        if codec is video and isinstance(video, VideoCodec) and isinstance(image, ImageCodec):
            if video.config.image_fingerprint != image.fingerprint:
                raise UserError(
                    f"{video.name} extends image tokenizer {video.config.image_fingerprint}, "
                    f"but {image.name} is {image.fingerprint}; use the pair that belongs together"
                )
            for _, _, fingerprints, _ in codebooks:
                fingerprints.update(made_by)
        else:
            count = codec.num_codebooks
            names = [name] if count == 1 else [f"{name}-{index}" for index in range(count)]
            codebooks += [(book, codec.codebook_size, dict(made_by), None) for book in names]
    return Vocabulary.build(
        num_text=text.codebook_size, text_fingerprint=text.fingerprint, codebooks=codebooks
    )
