"""A reader of pages, and weights of a large network."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

VOID = {"meta", "img", "source", "br", "input"}


class Page(HTMLParser):
    """Checks that every element is closed in order; keeps elements, ids and the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.html = "", html
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> repeats an attribute"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name in names]

    def asks_nothing(self) -> bool:
        """Whether the page holds all that it shows, and no script."""
        sources = [(v or "data:") for _, a in self.elements for k, v in a.items() if k == "src"]
        events = [k for _, a in self.elements for k in a if k.startswith("on")]
        outside = re.search(r"https?://|url\(|@import", self.html)
        asked = self.all("script", "link", "iframe", "object") or events or outside
        return not asked and all(each.startswith("data:") for each in sources)


@pytest.fixture
def read_page():
    """HTML -> a `Page`."""
    return Page


@pytest.fixture
def inception_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights of torch-fidelity's InceptionV3, which sees 75 pixels a side meanwhile."""
    inception = pytest.importorskip("torch_fidelity").FeatureExtractorInceptionV3
    monkeypatch.setattr(inception, "INPUT_IMAGE_SIZE", 75)

    class Unloaded(inception):
        def load_state_dict(self, *_: object) -> None:
            """Keeps what it begins with."""

    torch.save({}, tmp_path / "none.pth")
    with torch.device("meta"):
        shapes = Unloaded("inception", ["2048"], str(tmp_path / "none.pth")).state_dict()
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in shapes.items():
        values = torch.ones(tensor.shape)  # of normalisations
        if tensor.ndim > 1:
            values = torch.randn(tensor.shape, generator=generator)
            values *= (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("bias", "running_mean")):
            values = torch.zeros(tensor.shape)
        tensors[name] = values.half()
    torch.save(tensors, path := tmp_path / "weights-inception.pth")
    return path
