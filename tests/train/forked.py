"""Ranks as forks of one process, which has imported everything: they start in no time."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed


def fork(run: Callable[..., None], count: int, *arguments: Any, check: bool = True) -> int:
    """`run(rank, count, *arguments)` in `count` processes; how many failed, with `check` none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=run, args=(rank, count, *arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes if process.exitcode]
    if codes and check:
        raise SystemExit(f"{len(codes)} of {count} ranks failed: {codes}")
    return len(codes)


@contextmanager
def joined(rank: int, count: int) -> Iterator[None]:
    """One of the ranks, in the environment that torchrun would give it."""
    torch.set_num_threads(1)
    if count == 1:
        yield
        return
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    distributed.init_process_group("gloo")
    yield
    distributed.destroy_process_group()
