"""A judge of pictures: a small network that was trained on real pictures and their words.

It sees pixels alone and shares nothing with the model or its codecs. Its classes say whether a
picture shows what was asked for; its features, frozen, say how far pictures are from each other.

Legend: N pictures, C classes, F features.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmpt.config import UserError
from mmpt.data.shards import Quarantine, is_heldout, read_documents
from mmpt.parts import Image, Text
from mmpt.progress import Bar
from mmpt.tokenizers.image import to_pixels
from mmpt.tokenizers.judge import spoken_words

SIDE = 64  # pixels that it sees
WIDTHS = (24, 48, 96, 128)  # channels; each stage halves the sides
BATCH, LR, SHIFT = 64, 2e-3, 4

Classes = Mapping[str, Sequence[str]]  # name -> words, of which a caption has one


@dataclass(frozen=True)
class LabelledPictures:
    """pixels: uint8 (N, SIDE, SIDE, 3). labels: bool (N, C), at least one in each row."""

    pixels: np.ndarray
    labels: np.ndarray


class PictureNet(nn.Module):
    """Convolutions, a mean over places (the features), and a linear layer (the classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classes = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores (N, C) of pixels float (N, 3, SIDE, SIDE) in [-1, 1]."""
        return self.classes(self.body(pixels))


@dataclass(frozen=True)
class PictureJudge:
    """The frozen network and the words of its classes."""

    net: PictureNet
    classes: Classes
    num_pictures: int  # that it was trained on

    @torch.no_grad()
    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """float (N, F) of length 1 each, of uint8 (height, width, 3) pictures."""
        shown = [self.net.body(batch) for batch in _resized(pictures)]
        return F.normalize(torch.cat(shown), dim=1).numpy()

    @torch.no_grad()
    def guesses(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """int (N,): the likeliest class of each."""
        return torch.cat([self.net(batch).argmax(1) for batch in _resized(pictures)]).numpy()

    def labels(self, texts: Sequence[str]) -> np.ndarray:
        """bool (C,): the classes that a caption names."""
        return labels_of(texts, self.classes)


def labels_of(texts: Sequence[str], classes: Classes) -> np.ndarray:
    """bool (C,): which classes have a word among those of the texts."""
    words = {word for text in texts for word in spoken_words(text)}
    return np.array([bool(words & set(names)) for names in classes.values()], dtype=bool)


def picture_judge(
    shards: Sequence[str], classes: Classes, *, epochs: int, seed: int, folder: Path
) -> PictureJudge:
    """Train a judge on what raw shards hold for training, or read the one that `folder` has."""
    paths = _paths(shards)
    sizes = [[path.name, path.stat().st_size] for path in paths]
    about = json.dumps([sizes, {k: list(v) for k, v in classes.items()}, epochs, seed, WIDTHS])
    file = folder / f"picture-judge-{hashlib.sha256(about.encode()).hexdigest()[:12]}.safetensors"
    net = PictureNet(len(classes))
    if file.is_file():
        tensors = load_file(file)
        count = int(tensors.pop("num_pictures"))
        net.load_state_dict(tensors)
        return PictureJudge(net.eval(), classes, count)
    pictures = read_pictures(paths, classes)
    fit(net, pictures, epochs=epochs, seed=seed)
    count = len(pictures.labels)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file({**net.state_dict(), "num_pictures": torch.tensor(count)}, temporary)
    temporary.replace(file)
    return PictureJudge(net.eval(), classes, count)


def read_pictures(paths: Sequence[Path], classes: Classes) -> LabelledPictures:
    """The pictures of documents that are not held out and whose texts name a class."""
    pixels, labels = [], []
    for document in read_documents(paths, Quarantine(None)):
        named = labels_of([p.text for p in document.parts if isinstance(p, Text)], classes)
        if is_heldout(document.base) or document.order != "any" or not named.any():
            continue
        found = [part.pixels for part in document.parts if isinstance(part, Image)]
        pixels += found
        labels += [named] * len(found)
    missing = [name for name, seen in zip(classes, np.any(labels, axis=0), strict=True) if not seen]
    if missing:
        raise UserError(f"no training picture is of class {missing[0]!r}; take it out of [classes]")
    [*batches] = _resized(pixels)
    small = ((torch.cat(batches) + 1) * 127.5).round().to(torch.uint8)
    return LabelledPictures(small.permute(0, 2, 3, 1).numpy(), np.stack(labels))


def fit(net: PictureNet, pictures: LabelledPictures, *, epochs: int, seed: int) -> None:
    """Train in place: random shifts, half of the pictures blurred as codecs blur."""
    generator = torch.Generator().manual_seed(seed)
    _initialise(net, generator)
    pixels, targets = to_pixels(pictures.pixels), torch.from_numpy(pictures.labels).float()
    targets = targets / targets.sum(1, keepdim=True)
    steps = epochs * -(-len(pixels) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=max(steps, 2))
    net.train()
    with Bar(total=steps, desc="train the judge of pictures", leave=False) as progress:
        for _ in range(epochs):
            order = torch.randperm(len(pixels), generator=generator)
            for rows in order.split(BATCH):
                seen = _augment(pixels[rows], generator)
                loss = F.cross_entropy(net(seen), targets[rows], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
    net.eval()


def _initialise(net: PictureNet, generator: torch.Generator) -> None:
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, generator=generator)


def _augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    y, x = torch.randint(0, 2 * SHIFT + 1, (2,), generator=generator).tolist()
    padded = F.pad(pixels, (SHIFT,) * 4, mode="replicate")
    moved = padded[:, :, y : y + SIDE, x : x + SIDE]
    blurred = F.avg_pool2d(F.pad(moved, (1,) * 4, mode="replicate"), 3, stride=1)
    chosen = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, blurred, moved)


def _resized(pictures: Sequence[np.ndarray]) -> list[Tensor]:
    """Batches float (n, 3, SIDE, SIDE) of pictures of any size."""
    small = [
        F.interpolate(to_pixels(each[None]), (SIDE, SIDE), mode="bilinear", antialias=True)
        for each in pictures
    ]
    return [torch.cat(small[i : i + BATCH]) for i in range(0, len(small), BATCH)]


def _paths(shards: Sequence[str]) -> list[Path]:
    found = []
    for pattern in shards:
        matches = sorted(Path(pattern).parent.glob(Path(pattern).name))
        if not matches:
            raise UserError(f"no raw shard matches {pattern}; give the recipe's pictures others")
        found += matches
    return found
