"""Benchmarks side by side with others: `mmpt bench NAME`, one file for each name."""

import importlib
from typing import Any

from mmpt.config import UserError

# name -> module:function, which takes a device and returns rows
BENCHMARKS = {
    "codecs": "mmpt.bench.codecs:codecs",
    "data": "mmpt.bench.data:data",
    "decode": "mmpt.bench.decode:decode",
    "moe": "mmpt.bench.moe:moe",
    "streams": "mmpt.bench.streams:streams",
    "train": "mmpt.bench.train:train",
}


def bench(name: str, *, device: str = "cpu") -> dict[str, Any]:
    """Measure NAME beside its peers or limits, in one run on this machine: codecs, data, decode,
    moe, streams or train.

    A row's ratio above 1 means that ours is better; outputs are shown equal before anything is
    timed, and peers run at their fastest settings. codecs: needs pip install 'mmpt[test]'. data:
    reading, packing, waiting and resuming, beside webdataset, and beside Energon where it is: pip
    install 'mmpt[bench]'. decode: one id at a time beside transformers' generate, and blocks in
    parallel beside both, passes and seconds. streams: an hour of sound, a second at a time, must
    not take more memory than a minute; some minutes. train: a training step beside the machine's
    peak, OLMoE, and itself without watching and checkpoints: pip install 'mmpt[eval]'.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}")
    from mmpt.bench.harness import check_device, environment  # which load torch

    module, function = BENCHMARKS[name].split(":")
    rows = getattr(importlib.import_module(module), function)(check_device(device))
    return {"rows": [row.as_dict() for row in rows], "environment": environment(device)}
