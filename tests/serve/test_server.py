"""Many threads ask one server: each gets what it would get alone, in its turn, or a clear no."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event as Flag
from typing import Any

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.model.config import ModelConfig
from mmpt.model.step import Stepper
from mmpt.model.transformer import Decoder
from mmpt.parts import Image
from mmpt.pipeline import Pipeline
from mmpt.processor import Processor
from mmpt.request import Generate
from mmpt.results import Cancelled, Preview, Result, TextDelta
from mmpt.serve import Server

SMALL: dict[str, Any] = {"height": 16, "width": 16, "frames": 5, "max_ids": 12}
SMALL |= {"max_seconds": 0.5, "num_passes": 2}
LONG: dict[str, Any] = SMALL | {"height": 64, "width": 64}  # 256 codes
ENDLESS: dict[str, Any] = SMALL | {"height": 512, "width": 512}


def build(processor: Processor, **options: Any) -> Pipeline:
    config = ModelConfig(
        vocab_size=len(processor.vocabulary),
        width=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        expert_hidden=16,
        vocabulary=processor.vocabulary.fingerprint,
        **options,
    )
    model = Decoder.from_config(config, seed=0)
    model.add_noisy_groups()
    return Pipeline(model, processor)


@pytest.fixture(scope="module")
def pipeline(processor: Processor) -> Pipeline:
    return build(processor)


@pytest.fixture
def server(pipeline: Pipeline) -> Iterator[Server]:
    with Server(pipeline) as server:
        yield server


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """What calls from as many threads give; errors as they are."""

    def caught(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(caught, calls))


def asked(answers: Pipeline | Server, *items: Any, **options: Any) -> Callable[[], Result]:
    return lambda: answers(*items, **SMALL | options)


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    *((("a red apple " * n,), {"to": to, "seed": n}) for n in (1, 3) for to in ("text", "image")),
    *((("red",), {"to": "image", "decoder": "dida", "seed": n}) for n in range(4)),
    *((("red",), {"to": "image", "guidance": 2.0, "seed": n}) for n in range(2)),
    (("red",), {"to": "image", "decoder": "dida", "guidance": 2.0}),
    (("a", Generate("image"), "and", Generate("speech")), {"seed": 5}),
    (("a", Generate("text"), Generate("image")), {"decoder": "dida"}),
    (("hum",), {"to": "speech", "temperature": 0.7}),
    (("hum",), {"to": "speech", "decoder": "dida"}),
    (("move",), {"to": "video"}),
    (("anything",), {"max_ids": 60}),
    (("anything",), {"max_ids": 60, "decoder": "dida", "temperature": 0}),
]


@pytest.mark.parametrize("rope", ["1d", "3d"])  # steps of the latter are never shared
def test_requests_of_all_kinds_at_once_give_what_each_gives_alone(
    processor: Processor, rope: str
) -> None:
    pipeline = build(processor, rope=rope)
    alone = [asked(pipeline, *items, **options)() for items, options in CALLS]
    with Server(pipeline) as server:
        found = together([asked(server, *items, **options) for items, options in CALLS])
    for expected, result in zip(alone, found, strict=True):
        assert isinstance(result, Result), result
        assert np.array_equal(result.ids, expected.ids)


def test_a_stream_tells_what_a_stream_of_the_pipeline_tells(
    pipeline: Pipeline, server: Server
) -> None:
    kinds: list[dict[str, Any]] = [{"to": "text"}, {"to": "speech"}]
    for kind in (*kinds, {"to": "image", "decoder": "dida"}):
        options: dict[str, Any] = {**SMALL, **kind}
        wanted = list(pipeline.stream("red", **options))
        streams = [server.stream("red", **options) for _ in range(3)]
        for events in map(list, streams):
            assert [type(e) for e in events] == [type(e) for e in wanted]
            assert [e.text for e in events if isinstance(e, TextDelta)] == [
                e.text for e in wanted if isinstance(e, TextDelta)
            ]


def test_a_request_joins_while_another_one_streams(pipeline: Pipeline, server: Server) -> None:
    calls = [{"to": "text", "seed": 2}, {"to": "image"}, {"to": "image", "decoder": "dida"}]
    alone = pipeline("red", to="image", **LONG)
    stream = server.stream("red", to="image", **LONG)
    next(stream)  # it has begun
    found = together([asked(server, "red", **options) for options in calls])
    began = time.monotonic()
    *_, result = stream
    assert time.monotonic() > began
    for options, each in zip(calls, found, strict=True):
        assert np.array_equal(each.ids, asked(pipeline, "red", **options)().ids)
    assert isinstance(result, Result)
    assert np.array_equal(result.ids, alone.ids)


def test_whoever_joined_late_is_answered_before_a_long_one_ends(server: Server) -> None:
    flag = Flag()
    endless = server.stream("red", to="image", cancel=flag, **ENDLESS)
    next(endless)
    assert len(server("red", to="image", **SMALL)) == 1
    assert len(server("red", to="video", decoder="dida", **SMALL)) == 1
    flag.set()
    with pytest.raises(Cancelled):
        list(endless)


@pytest.mark.parametrize("decoder", ["ar", "dida"])
def test_cancelling_one_leaves_the_others(pipeline: Pipeline, server: Server, decoder: str) -> None:
    options: dict[str, Any] = LONG | {"to": "image", "decoder": decoder, "num_passes": 64}
    alone = pipeline("red", **options)
    flag = Flag()
    streams = [server.stream("red", cancel=flag if n == 1 else None, **options) for n in range(3)]
    for stream in streams:
        next(stream)
    flag.set()
    with pytest.raises(Cancelled):
        list(streams[1])
    streams[2].close()  # whoever leaves needs no flag
    *_, result = streams[0]
    assert isinstance(result, Result)
    assert np.array_equal(result.ids, alone.ids)


def test_what_still_waits_can_be_cancelled(pipeline: Pipeline) -> None:
    flag = Flag()
    with Server(pipeline, batch=1) as server:
        endless = server.stream("red", to="image", **ENDLESS)
        next(endless)
        waiting = server.stream("red", to="image", cancel=flag, **SMALL)
        flag.set()
        with pytest.raises(Cancelled):
            next(waiting)
        endless.close()
        assert len(server("red", to="image", **SMALL)) == 1


def test_a_request_that_cannot_be_fails_alone(server: Server) -> None:
    wrong = asked(server, "red", to="image", height=17)
    *right, error = together([*[asked(server, "red", to="image")] * 3, wrong])
    assert all(isinstance(result, Result) for result in right)
    assert isinstance(error, UserError)
    assert "multiples of" in str(error)
    with pytest.raises(UserError, match="no medium"):
        server("red", to="smell")  # type: ignore[arg-type]
    assert len(server("red", to="text", **SMALL)) == 1


def test_of_a_batch_only_those_fail_that_would_fail_alone(
    pipeline: Pipeline, server: Server
) -> None:
    options: dict[str, Any] = SMALL | {"to": "image", "decoder": "dida"}
    longer: dict[str, Any] = {**options, "height": 64, "width": 64}
    busy = server.stream("red", **longer)
    broken = Image(np.zeros((16, 16, 3), np.uint8))
    object.__setattr__(broken, "pixels", np.zeros((0, 0, 3), np.uint8))
    with pytest.raises(Exception) as alone:  # noqa: PT011 # whatever it is
        pipeline(broken, **options)
    calls = [asked(server, "red", **options, seed=n) for n in range(3)]
    *right, error = together([*calls, asked(server, broken, **options)])
    list(busy)
    assert type(error) is type(alone.value)
    for seed, result in enumerate(right):
        assert np.array_equal(result.ids, pipeline("red", seed=seed, **options).ids)


def test_a_shared_pass_that_fails_costs_nobody_the_answer(
    pipeline: Pipeline, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = SMALL | {"to": "text", "max_ids": 40}
    wanted = [list(pipeline.stream("red", seed=seed, **options)) for seed in range(3)]
    step, failed = Stepper.__call__, []

    def once(self: Stepper, ids: Any, *rest: Any) -> Any:
        if len(ids) == 3 and not failed:
            failed.append(True)
            raise RuntimeError("out of memory")
        return step(self, ids, *rest)

    monkeypatch.setattr(Stepper, "__call__", once)
    streams = [server.stream("red", seed=seed, **options) for seed in range(3)]
    for stream, events in zip(streams, wanted, strict=True):
        found = list(stream)
        told = [[e.text for e in each if isinstance(e, TextDelta)] for each in (found, events)]
        assert told[0] == told[1]  # nothing twice
        assert isinstance(found[-1], Result)
    assert failed
    assert len(server("red", **options)) == 1


def test_a_full_queue_says_so_at_once(pipeline: Pipeline) -> None:
    with Server(pipeline, batch=1, queue=2) as server:
        endless = server.stream("red", to="image", **ENDLESS)
        next(endless)
        waiting = [server.stream("red", to="image", **SMALL) for _ in range(2)]
        with pytest.raises(UserError, match=r"^2 requests wait already; try again in a moment$"):
            server("red", to="image", **SMALL)
        waiting.pop().close()
        endless.close()
        *_, result = waiting[0]
        assert isinstance(result, Result)
        assert len(server("red", to="image", **SMALL)) == 1
    for number in ({"queue": 0}, {"batch": 0}):
        with pytest.raises(UserError, match="use 1 or more"):
            Server(pipeline, **number)


def test_a_kind_that_is_full_lets_others_pass_and_keeps_its_order(pipeline: Pipeline) -> None:
    ended: list[str] = []

    def note(name: str, stream: Iterator[Any]) -> None:
        list(stream)
        ended.append(name)

    with Server(pipeline, batch=1) as server, ThreadPoolExecutor(8) as threads:
        first = server.stream("red", to="image", **LONG)
        next(first)
        streams = {f"image {n}": server.stream("red", to="image", **SMALL) for n in range(3)}
        streams["text"] = server.stream("red", to="text", **SMALL)
        jobs = [threads.submit(note, name, stream) for name, stream in streams.items()]
        jobs.append(threads.submit(note, "first", first))
        for job in jobs:
            job.result()
    assert ended.index("text") < ended.index("first")  # though it came last
    assert [name for name in ended if name.startswith("image")] == [f"image {n}" for n in range(3)]


def test_kinds_get_equal_time_however_many_ask(pipeline: Pipeline) -> None:
    """Fifteen clips in many passes slow a text down about by half, and not by fifteen."""

    def seconds(answers: Pipeline | Server) -> float:
        began = time.monotonic()
        answers("red", to="text", temperature=0, max_ids=60)
        return time.monotonic() - began

    alone, flag = min(seconds(pipeline) for _ in range(3)), Flag()
    options: dict[str, Any] = LONG | {"to": "video", "decoder": "dida", "num_passes": 64}
    with Server(pipeline) as server:
        clips = [server.stream("red", seed=n, cancel=flag, **options) for n in range(15)]
        next(clips[0])
        shared = min(seconds(server) for _ in range(3))
        flag.set()
        for clip in clips:
            with pytest.raises(Cancelled):  # it was still at work
                list(clip)
    assert shared < 8 * alone + 0.2


def test_batches_of_blocks_are_gathered_and_previewed(pipeline: Pipeline, server: Server) -> None:
    options: dict[str, Any] = SMALL | {"to": "image", "decoder": "dida"}
    first = server.stream("red", **dict(options, num_passes=4))
    results = together([lambda n=n: list(server.stream("a", seed=n, **options)) for n in range(6)])
    list(first)
    for seed, events in enumerate(results):
        assert sum(isinstance(event, Preview) for event in events) == 2
        assert np.array_equal(events[-1].ids, pipeline("a", seed=seed, **options).ids)
    assert max(events[-1].place[1] for events in results) > 1


def test_closing_ends_everything_and_refuses_more(pipeline: Pipeline) -> None:
    server = Server(pipeline, batch=1)
    streams = [server.stream("red", to="image", **ENDLESS) for _ in range(3)]
    next(streams[0])
    server.close()
    server.close()
    for stream in streams:
        with pytest.raises(Cancelled):
            list(stream)
    with pytest.raises(UserError, match="closed"):
        server("red", **SMALL)
