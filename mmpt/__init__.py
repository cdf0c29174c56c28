"""mmpt: pretraining for models that read and write text, images, video and speech as one stream.

Importing it is cheap: torch is loaded by what computes, when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from mmpt.edit import Edit
    from mmpt.parts import Audio, Image, Message, Text, Video
    from mmpt.pipeline import Pipeline
    from mmpt.request import Generate, Request
    from mmpt.results import Result
    from mmpt.serve import Server

__version__ = "0.1.0"

_PUBLIC = {
    "Audio": "mmpt.parts",
    "Edit": "mmpt.edit",
    "Generate": "mmpt.request",
    "Image": "mmpt.parts",
    "Message": "mmpt.parts",
    "Text": "mmpt.parts",
    "Video": "mmpt.parts",
    "Pipeline": "mmpt.pipeline",
    "Request": "mmpt.request",
    "Result": "mmpt.results",
    "Server": "mmpt.serve",
}
__all__ = [
    "Audio",
    "Edit",
    "Generate",
    "Image",
    "Message",
    "Pipeline",
    "Request",
    "Result",
    "Server",
    "Text",
    "Video",
    "load",
]


def load(path: "str | Path", *, revision: str | None = None, device: str = "cpu") -> "Pipeline":
    """Open a model folder, a run or a model on a hub for inference.

    path: a folder, or `owner/name` or `owner/name@revision` on a hub. revision: a branch, a tag or
    a commit of it. Raises UserError when there is no such model.
    """
    from mmpt.pipeline import Pipeline

    return Pipeline.from_pretrained(path, revision=revision, device=device)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mmpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
