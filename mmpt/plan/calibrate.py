"""This machine's numbers, measured in moments: products, memory, messages between processes.

Each process computes on one thread. More processes than cores share these.
"""

import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed

from mmpt.model.attention import Context
from mmpt.model.backends import Causal
from mmpt.model.dispatch import Dispatch, group_table
from mmpt.model.layer import Layer
from mmpt.model.layout import Layout as AttentionLayout
from mmpt.model.rotary import Rotary
from mmpt.plan.machines import Machine
from mmpt.plan.workload import Workload
from mmpt.process import one_thread
from mmpt.train.loss import CHUNK
from mmpt.vocab import Modality

REPEATS = 7  # the best of them counts
MESSAGE = 8 << 20


def this_machine(work: Workload, *, processes: int = 2) -> Machine:
    """As so many processes find it that train together."""
    with one_thread():
        share = core_share(processes)
        rate = _rate_of_products(work, processes) * share
        latency, link = measure_links(processes)
        return Machine(
            name=f"CPU process, one of {processes} on {_cores()} cores",
            bf16=rate,
            fp32=rate,
            memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / processes,
            memory_rate=_rate_of_memory(work) * share,
            link=link,
            network=link,
            link_latency=latency,
            network_latency=latency,
            node=processes,
            efficiency=1.0,  # rates are those of the model's own shapes
            overlap=0.0,  # sending takes the same cores as computing
            small_step=_small_step(work) / share,
        )


def measure_links(processes: int) -> tuple[float, float]:
    """Seconds of a small all-reduce per doubling of ranks, and bytes per second of all-gathers."""
    if processes == 1:
        return 0.0, 1e12
    with tempfile.TemporaryDirectory() as folder:
        start(_time_links, processes, Path(folder) / "links.json")
        return tuple(json.loads((Path(folder) / "links.json").read_text()))


def start(run: Callable[..., None], count: int, *arguments: Any) -> None:
    """`run(*arguments)` in `count` processes of one group; RuntimeError where any of them fails.

    They are forks, which have imported everything.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_joined, args=(run, rank, count, port, *arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise RuntimeError(f"{len(failed)} of {count} processes failed: {failed}")


def _joined(run: Callable[..., None], rank: int, count: int, port: int, *arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if count == 1:
        run(*arguments)
        return
    distributed.init_process_group("gloo")
    run(*arguments)
    distributed.destroy_process_group()


def _time_links(out: Path) -> None:
    count = distributed.get_world_size()
    small, large = torch.zeros(1), torch.zeros(MESSAGE // 4 // count)
    whole = torch.empty(len(large) * count)
    latency = _best(lambda: distributed.all_reduce(small), time.perf_counter)
    gather = lambda: distributed.all_gather_into_tensor(whole, large)  # noqa: E731 # one line
    took = _best(gather, time.perf_counter)
    if distributed.get_rank() == 0:
        doublings = count.bit_length() - 1
        sent = whole.nbytes * (count - 1) / count
        out.write_text(json.dumps([latency / doublings, sent / max(took - latency, 1e-9)]))


def core_share(processes: int) -> float:
    """Of a core, that each of so many processes has."""
    return min(1.0, _cores() / processes)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _best(function: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of this process alone, unless by another clock: others use the machine, too."""
    times = []
    for _ in range(REPEATS + 1):
        began = clock()
        function()
        times.append(clock() - began)
    return min(times[1:])


def _rate_of_memory(work: Workload) -> float:
    """Bytes per second, read and written by what is no product: on CPUs far less than a copy."""
    x = torch.rand(CHUNK, work.model.vocab_size)
    calls = (lambda: x.to(torch.bfloat16), x.exp, lambda: x * x)
    return (6 + 8 + 8) * x.numel() / sum(_best(call) for call in calls)


def _rate_of_products(work: Workload, ranks: int) -> float:
    """Operations per second over all products of a step, forward and back."""
    operations = seconds = 0.0
    dtype = torch.bfloat16 if work.products == 2 else torch.float32
    for num, rows, width, out in _products(work, ranks):
        x, w, y = (
            torch.randn(size).to(dtype) for size in ((rows, width), (width, out), (rows, out))
        )
        took = sum(_best(call) for call in (lambda: x @ w, lambda: y @ w.T, lambda: x.T @ y))  # noqa: B023 # called at once
        operations += num * 6 * rows * width * out
        seconds += num * took
    for num, took, flops in _attention(work, ranks):
        operations += num * flops
        seconds += num * took
    return operations / seconds


def _products(work: Workload, ranks: int) -> Iterator[tuple[float, int, int, int]]:
    """How often, and (rows, width) x (width, out), of one rank's batch."""
    model, data = work.model, work.recipe.data
    ids, layers = data.rows * data.length // ranks, model.num_layers
    width, heads = model.width, model.width_of_heads
    yield layers, ids, width, heads + 2 * model.num_kv_heads * model.width_per_head
    yield layers, ids, heads, width
    for group in model.groups.values():
        served = ids * work.share_of(group)
        for experts, rows, hidden in (
            (group.num_experts, served * group.num_active / group.num_choices, model.expert_hidden),
            (1, served, group.shared_hidden),
        ):
            if hidden and round(rows):
                yield layers * experts, round(rows), width, 2 * hidden
                yield layers * experts, round(rows), hidden, width
    yield ids / CHUNK, CHUNK, width, model.vocab_size


def _attention(work: Workload, ranks: int) -> Iterator[tuple[float, float, float]]:
    """How often, its seconds and operations: of one row, forward and back."""
    model, data = work.model, work.recipe.data
    size = (1, model.num_heads, data.length, model.width_per_head)
    q, k, v = (torch.randn(size, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, data.length, data.length, dtype=torch.bool).tril()

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()

    operations = 3 * 4 * model.width_of_heads * data.length**2
    yield model.num_layers * data.rows / ranks, _best(attend), operations


def _small_step(work: Workload) -> float:
    """Of one layer on an id of each modality: next to nothing to compute, and every call."""
    config = work.model
    layer = Layer(config).train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.01)
    modality = torch.arange(len(Modality))[None]
    layout = AttentionLayout.clean(torch.zeros_like(modality), modality)
    context = Context(Rotary.at(layout.position, config, torch.float32), Causal())
    group = group_table(config)[0, modality]
    dispatch = Dispatch.plan(group, config, ids=torch.zeros_like(modality), layout=layout)
    x = torch.randn(1, len(Modality), config.width, requires_grad=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=work.products == 2):
            y, _ = layer(x, context=context, dispatch=dispatch, cache=None)
        y.sum().backward()

    return _best(step)


@contextmanager
def quiet() -> Iterator[None]:
    """Logs of the processes that are measured are not the user's."""
    import logging

    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
