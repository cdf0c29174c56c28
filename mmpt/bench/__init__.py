"""Benchmarks side by side with others: `mmpt bench NAME`, one file for each name."""

import importlib
from typing import Any

from mmpt.config import UserError

# name -> module:function, which takes a device and returns rows
BENCHMARKS = {"codecs": "mmpt.bench.codecs:codecs", "streams": "mmpt.bench.streams:streams"}


def bench(name: str, *, device: str = "cpu") -> dict[str, Any]:
    """Measure NAME beside its peers or limits, in one run on this machine: codecs or streams.

    A row's ratio above 1 means that ours is better. codecs: outputs are shown equal before anything
    is timed; the peer runs at its fastest settings; needs: pip install 'mmpt[test]'. streams: an
    hour of sound, a second at a time, must not take more memory than a minute; some minutes.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}")
    from mmpt.bench.harness import check_device, environment  # which load torch

    module, function = BENCHMARKS[name].split(":")
    rows = getattr(importlib.import_module(module), function)(check_device(device))
    return {"rows": [row.as_dict() for row in rows], "environment": environment(device)}
