"""Pictures of what a codec in training rebuilds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from mmpt.data.shards import Document, write_shard
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.tokenizers.base import load_codec
from mmpt.tokenizers.samples import Samples
from mmpt.tokenizers.train import train

GREY = 90


def grey(size: int = 64) -> Image:
    return Image(np.full((size, size, 3), GREY, np.uint8))


@pytest.mark.parametrize(
    ("kind", "parts", "shape"),
    [
        ("image", [grey(), grey(40), grey(8)], (130, 64 + 2 + 32)),  # sides in units of 16
        ("image", [grey(300)], (514, 256)),
        ("video", [Video(np.zeros((12, 64, 64, 3), np.uint8), 12.0)] * 2, (262, 592)),
        ("speech", [Audio(np.zeros(1600 * n, np.float32), 16_000) for n in (5, 9)], (326, 90)),
    ],
)
def test_every_medium_is_drawn_above_what_is_rebuilt(
    kind: str, parts: list[Part], shape: tuple[int, int], zoo: Path, tmp_path: Path
) -> None:
    samples = Samples(load_codec(zoo / kind), [], [[Text("a")], parts])
    samples.draw(tmp_path / "deep" / "a.png")
    picture = np.asarray(Pillow.open(tmp_path / "deep" / "a.png"))
    assert picture.shape == (*shape, 3)


def test_originals_are_above(zoo: Path, tmp_path: Path) -> None:
    samples = Samples(load_codec(zoo / "image"), [], [[grey()]])
    samples.draw(tmp_path / "a.png")
    picture = np.asarray(Pillow.open(tmp_path / "a.png"))
    assert (picture[:64, :64] == GREY).all()
    assert not (picture[66:130, :64] == GREY).all()


def test_held_out_media_are_shown_if_there_are_any(zoo: Path) -> None:
    codec, seen, heldout = load_codec(zoo / "image"), grey(), grey(48)
    assert Samples(codec, [[heldout]], [[seen]]).media[0].shape == (1, 48, 48, 3)
    assert Samples(codec, [[Text("no picture")]], [[seen]]).media[0].shape == (1, 64, 64, 3)
    assert len(Samples(codec, [], [[seen] * 20]).media) == 8


def test_a_training_draws_samples_of_held_out_documents_and_is_not_changed_by_it(
    tiny: dict[str, list[str]],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    key: Callable[..., str],
    part: Callable[[type, int], Part],
) -> None:
    documents = [Document(key(i), key(i), "any", [part(Image, i)]) for i in range(3)]
    heldout = key(0, heldout=True)
    documents.append(Document(heldout, heldout, "any", [grey()]))
    write_shard(tmp_path / "a.tar", documents)
    recipe = write_recipe(tmp_path, "image", tmp_path / "a.tar")
    plain = train(recipe, [*tiny["image"], "samples_every=0"], out=tmp_path / "plain")
    drawn = train(recipe, [*tiny["image"], "samples_every=2"], out=tmp_path / "drawn")
    assert plain["fingerprint"] == drawn["fingerprint"]
    assert not (tmp_path / "plain" / "samples").exists()
    found = sorted((tmp_path / "drawn" / "samples").iterdir())
    assert [path.name for path in found] == [f"step-{n:06d}.png" for n in (2, 4, 6)]
    assert (np.asarray(Pillow.open(found[0]))[:64, :64] == GREY).all()
