"""FID and KID as torch-fidelity measures them: its InceptionV3, with weights that the user has.

Nothing is downloaded. The distances of few pictures are not those of 50,000: compare them within a
gate, not with published ones.

Legend: N pictures, F features (`WIDTH`).
"""

import os
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from mmpt.config import UserError

BATCH = 16
WIDTH = 2048  # features, those in front of the classes
LARGEST = 1 << 28  # bytes of a weights file, twice what torch-fidelity's has, packed or not
SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_LOADING = threading.Lock()  # the environment is that of all threads


class Inception:
    """The frozen network. Raises UserError where the package or the weights are missing or wrong.

    path: torch-fidelity's weights-inception-2015-12-05-*.pth.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
        except ImportError:
            raise UserError(
                "inception needs torch-fidelity: pip install 'mmpt[eval]', or leave inception out"
            ) from None
        _check_size(Path(path))
        self._net: Any
        try:
            with _tensors_only():
                self._net = FeatureExtractorInceptionV3("inception", [str(WIDTH)], str(path))
        except Exception as error:  # a damaged or malicious file may raise anything
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"inception = {str(path)!r} holds no weights of torch-fidelity's InceptionV3 "
                f"({reason}); give its weights-inception-2015-12-05-*.pth"
            ) from None

    @torch.no_grad()
    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """float64 (N, F) of uint8 (height, width, 3) pictures of any sizes."""
        shown = [rearrange(torch.from_numpy(p.copy()), "h w c -> c h w") for p in pictures]
        out: list[torch.Tensor] = []
        for start in range(0, len(shown), BATCH):
            batch = shown[start : start + BATCH]
            if len({picture.shape for picture in batch}) == 1:
                out += self._net(torch.stack(batch))
            else:
                out += [self._net(picture[None])[0] for picture in batch]
        return torch.cat(out).double().numpy()


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                size = max(size, sum(member.file_size for member in packed.infolist()))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"inception = {str(path)!r} cannot be read: {error}") from None
    if size > LARGEST:
        raise UserError(
            f"inception = {str(path)!r} holds {size:,} bytes; the weights of InceptionV3 are "
            f"fewer than {LARGEST:,}"
        )


@contextmanager
def _tensors_only() -> Iterator[None]:
    """torch-fidelity would unpickle its weights; PyTorch lets all but tensors be refused."""
    with _LOADING:
        before = os.environ.get(SAFE)
        os.environ[SAFE] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[SAFE]
            else:
                os.environ[SAFE] = before
