"""`mmpt doctor`: what this machine has, and what will run where."""

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "torchvision",
    "torchaudio",
    "webdataset",
    "einops",
    "timm",
    "tokenizers",
    "av",
)
OPTIONAL = {
    "xformers": "gpu",
    "gradio": "demo",
    "ray": "ray",
    "tensorboard": "track",
    "wandb": "track",
    "trackio": "trackio",
    "torchmetrics": "eval",
    "torch_fidelity": "eval",
    "datatrove": "curate",
    "lm_eval": "eval-text",
}


def doctor() -> dict[str, Any]:
    """Say what this machine has and what will run where.

    Nothing is changed. `problems` is empty when the quickstart can run.
    """
    import torch

    disk = shutil.disk_usage(os.getcwd()).free / 2**30
    memory = _memory_gib()
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    devices = [f"{card.name}, {card.total_memory >> 30} GiB" for card in cards]
    problems = []
    if memory is not None and memory < 6:
        problems.append(f"{memory:.1f} GiB of memory are free; the quickstart needs 6")
    if disk < 2:
        problems.append(f"{disk:.1f} GiB of disk are free here; the quickstart needs 2")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_threads": torch.get_num_threads(),
        "bf16_instructions": _has_bf16(),
        "memory_free_gib": None if memory is None else round(memory, 1),
        "disk_free_gib": round(disk, 1),
        "cuda": devices or "none: everything runs on the CPU",
        "packages": {name: _version(name) for name in PACKAGES},
        "optional": {
            name: _version(name) or f"absent; pip install 'mmpt[{extra}]'"
            for name, extra in OPTIONAL.items()
        },
        "runs": {
            "training": "cuda, bf16" if devices else "cpu, bf16" if _has_bf16() else "cpu, fp32",
            "attention": "PyTorch SDPA",
            "tokenizers": "fp32, one unit at a time",
        },
        "problems": problems,
    }


def has_fast_bf16() -> bool:
    """Whether bf16 matrix products are faster than fp32 ones here."""
    import torch

    return torch.cuda.is_available() or _has_bf16()


def _has_bf16() -> bool:
    import torch

    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def _memory_gib() -> float | None:
    """What a new process can have: the caches of the system count, a container's limit holds."""
    found = [n for n in (_available_bytes(), _left_in_cgroup()) if n is not None]
    return min(found) / 2**30 if found else None


def _available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:  # no Linux
        return None
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kib[0] * 1024 if kib else None


def _left_in_cgroup(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The limit less what is in use and cannot be given back; None where there is no limit."""
    names = ("memory.max", "memory.current", "memory.stat")  # of version 2
    if (root / "memory").is_dir():
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        root = root / "memory"
    try:
        limit, used = (int((root / name).read_text()) for name in names[:2])
        rows = (root / names[2]).read_text().splitlines()
    except (OSError, ValueError):  # absent, or "max"
        return None
    cache = sum(int(row.split()[1]) for row in rows if row.startswith("inactive_file "))
    return max(0, limit - used + cache)


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return None
