"""Benchmarks side by side with others: `mmpt bench NAME`, one file for each name."""

import importlib
from pathlib import Path
from typing import Any

from mmpt.config import UserError

# name -> module:function, which takes a device (and serve a model) and returns rows
BENCHMARKS = {
    "codecs": "mmpt.bench.codecs:codecs",
    "data": "mmpt.bench.data:data",
    "decode": "mmpt.bench.decode:decode",
    "moe": "mmpt.bench.moe:moe",
    "serve": "mmpt.bench.serve:serve",
    "streams": "mmpt.bench.streams:streams",
    "train": "mmpt.bench.train:train",
}


def bench(name: str, model: Path | None = None, *, device: str = "cpu") -> dict[str, Any]:
    """Measure NAME beside its peers or limits, in one run on this machine: codecs, data, decode,
    moe, serve MODEL, streams or train.

    A row's ratio above 1 means that ours is better; outputs are shown equal before anything is
    timed, and peers run at their fastest settings. codecs: needs pip install 'mmpt[test]'. data:
    reading, packing, waiting and resuming, beside webdataset, and beside Energon where it is: pip
    install 'mmpt[bench]'. decode: one id at a time beside transformers' generate, and blocks in
    parallel beside both, passes and seconds. serve: a server of MODEL, a model folder or a run,
    asked by 1, 4 and 16 clients at once. streams: an hour of sound, a second at a time, must
    not take more memory than a minute; some minutes. train: a training step beside the machine's
    peak, OLMoE, and itself without watching and checkpoints: pip install 'mmpt[eval]'.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}")
    if model is not None and name != "serve":
        raise UserError(f"bench {name} takes no model; leave out {model}")
    from mmpt.bench.harness import check_device, environment  # which load torch

    module, function = BENCHMARKS[name].split(":")
    given = [check_device(device), *([model] if name == "serve" else [])]
    rows = getattr(importlib.import_module(module), function)(*given)
    return {"rows": [row.as_dict() for row in rows], "environment": environment(device)}
