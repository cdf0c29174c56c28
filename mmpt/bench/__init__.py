"""Benchmarks side by side with others: `mmpt bench NAME`, one file for each name."""

import importlib
from typing import Any

from mmpt.config import UserError

# name -> module:function, which takes a device and returns rows
BENCHMARKS = {"codecs": "mmpt.bench.codecs:codecs"}


def bench(name: str, *, device: str = "cpu") -> dict[str, Any]:
    """Measure NAME beside its peers, in one run on this machine: codecs.

    A row's ratio above 1 means that ours is better. Outputs are shown equal before anything is
    timed; the peer runs at its fastest settings. Needs: pip install 'mmpt[test]'.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}")
    from mmpt.bench.harness import check_device, environment  # which load torch

    module, function = BENCHMARKS[name].split(":")
    rows = getattr(importlib.import_module(module), function)(check_device(device))
    return {"rows": [row.as_dict() for row in rows], "environment": environment(device)}
