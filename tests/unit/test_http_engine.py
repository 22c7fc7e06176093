"""Engines over HTTP when things go wrong, with real processes that are killed and frozen."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_laws import expected_logprobs
from engines import SmallVllm, processes, save_policy, small_vllm, vllm_engine
from tiny_policy import tiny_policy, tiny_tokenizer

from querl.errors import EngineError
from querl.rollout.engine import RequestKey, Sampling
from querl.rollout.http_engine import HttpEngine
from querl.rollout.server import RemoteServer, ServerProcess, allow_connections
from querl.trainer.weights import PublishedWeights
from querl.types import Completion

KEY = RequestKey(seed=0, step=0, group=0, sample=0, turn=0)
PROMPT = tuple(tiny_tokenizer().encode("SELECT name"))
LONG = Sampling(max_tokens=40)
OTHER = tiny_policy(seed=1)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of a model; at the end of a test no process that was started with it may live."""
    yield save_policy(tiny_policy(), tmp_path)
    assert processes(tmp_path) == []


def run(engine: HttpEngine, work: Callable[[HttpEngine], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(go())


async def published(engine: HttpEngine) -> None:
    await engine.load_weights(PublishedWeights(OTHER), version=7)


def strike(folder: Path, number: signal.Signals) -> None:
    (server,) = processes(folder, of_server=True)
    os.kill(server, number)


def assert_sampled_by_other(completion: Completion) -> None:
    assert set(completion.versions) == {7}
    expected = expected_logprobs(OTHER, PROMPT, completion, 1.0)
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_server_struck_in_mid_rollout_is_started_anew_and_nothing_is_lost(
    folder: Path, number: signal.Signals
) -> None:
    engine = vllm_engine(folder, heartbeat_s=1.5, seconds_a_token=0.02)

    async def work(engine: HttpEngine) -> list[Completion]:
        await published(engine)
        keys = [replace(KEY, sample=i) for i in range(4)]
        asked = [asyncio.create_task(engine.generate(PROMPT, LONG, key)) for key in keys]
        await asyncio.sleep(0.3)
        strike(folder, number)
        asked.pop().cancel()
        return await asyncio.gather(*asked)

    found = run(engine, work)
    assert engine.num_restarts == 1
    for completion in found:
        assert_sampled_by_other(completion)


@pytest.mark.slow
def test_a_server_that_died_asleep_wakes_with_the_weights_it_had(folder: Path) -> None:
    engine = vllm_engine(folder)

    async def work(engine: HttpEngine) -> Completion:
        await published(engine)
        await engine.sleep()
        strike(folder, signal.SIGKILL)
        await engine.wake()
        return await engine.generate(PROMPT, LONG, KEY)

    assert_sampled_by_other(run(engine, work))


@pytest.mark.slow
def test_a_server_that_dies_twice_frees_all_that_wait_with_its_last_words(folder: Path) -> None:
    engine = vllm_engine(folder, seconds_a_token=0.05, dies_at=3)

    async def work(engine: HttpEngine) -> list[Any]:
        keys = [replace(KEY, sample=i) for i in range(5)]
        asked = [engine.generate(PROMPT, LONG, key) for key in keys]
        return await asyncio.gather(*asked, return_exceptions=True)

    errors = run(engine, work)
    assert {type(error) for error in errors} == {EngineError}
    assert "failed again after it was started anew" in str(errors[0])
    assert "it was told to die at this request" in str(errors[0])
    assert engine.num_restarts == 1


@pytest.mark.slow
def test_a_request_that_fills_the_memory_each_time_ends_with_the_servers_complaint(
    folder: Path,
) -> None:
    engine = vllm_engine(folder, memory=20)

    async def work(engine: HttpEngine) -> None:
        assert len((await engine.generate(PROMPT, LONG, KEY)).token_ids) == 40
        with pytest.raises(EngineError, match="EngineCore encountered an issue"):
            await engine.generate(PROMPT * 9, LONG, KEY)
        with pytest.raises(EngineError, match="EngineCore encountered an issue"):
            await published(engine)

    run(engine, work)
    assert engine.num_restarts == 1


@pytest.mark.slow
def test_a_refused_request_fails_alone(folder: Path) -> None:
    dialect = small_vllm(folder)
    server = ServerProcess(dialect, python=sys.executable, log=folder / "engine.log")
    engine = HttpEngine(dialect, server, tiny_tokenizer(), context=10**6)

    async def work(engine: HttpEngine) -> Completion:
        with pytest.raises(EngineError, match="maximum context length"):
            await engine.generate(PROMPT, Sampling(max_tokens=999), KEY)
        return await engine.generate(PROMPT, LONG, KEY)

    assert len(run(engine, work).token_ids) == 40
    assert engine.num_restarts == 0


@pytest.mark.slow
def test_weights_that_the_server_cannot_load_end_with_its_complaint(folder: Path) -> None:
    engine = vllm_engine(folder)

    async def work(engine: HttpEngine) -> None:
        asked = asyncio.create_task(engine.generate(PROMPT, LONG, KEY))
        with pytest.raises(EngineError, match=r"then, started anew: (.|\n)*KeyError: odd"):
            await engine.load_weights(OddWeights(OTHER), version=7)
        await asyncio.gather(asked, return_exceptions=True)

    run(engine, work)


class OddWeights(PublishedWeights):
    """With a name that no model has."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "odd", torch.zeros(1)


def test_as_many_files_may_be_open_as_requests(folder: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, before[1]))
        allow_connections(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (612, before[1])
        allow_connections(10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (612, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with pytest.raises(EngineError, match=r"set a smaller engine\.max_batch"):
        allow_connections(2**40)


@pytest.mark.slow
def test_a_slow_and_full_server_is_not_taken_for_a_frozen_one(folder: Path) -> None:
    engine = vllm_engine(folder, heartbeat_s=1.0, seconds_a_token=0.1, max_num_seqs=1)

    async def work(engine: HttpEngine) -> list[Completion]:
        keys = [replace(KEY, sample=i) for i in range(3)]
        return await asyncio.gather(*(engine.generate(PROMPT, LONG, key) for key in keys))

    assert [len(completion.token_ids) for completion in run(engine, work)] == [40, 40, 40]
    assert engine.num_restarts == 0


@pytest.mark.slow
def test_a_server_elsewhere_is_waited_for_and_gets_the_weights_again(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dialect = small_vllm(folder, seconds_a_token=0.02)
    command = dialect.command(python=sys.executable, port=port)
    engine = HttpEngine(
        dialect,
        RemoteServer(f"http://127.0.0.1:{port}", start_timeout_s=120.0),
        tiny_tokenizer(),
        context=256,
    )
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        environment = {**os.environ, **dialect.environment()}
        started.append(subprocess.Popen(command, env=environment))

    async def work(engine: HttpEngine) -> Completion:
        await published(engine)
        asked = asyncio.create_task(engine.generate(PROMPT, LONG, KEY))
        await asyncio.sleep(0.3)
        started[0].kill()
        start()
        return await asked

    start()
    try:
        assert_sampled_by_other(run(engine, work))
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert engine.num_restarts == 1


class Command(SmallVllm):
    """Starts ``words``, which are no server."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(small_vllm(Path("none"))._settings)
        self._words = words

    def command(self, *, python: str, port: int) -> Sequence[str]:
        return self._words


def never_ready(folder: Path, words: Sequence[str]) -> HttpEngine:
    dialect = Command(words)
    server = ServerProcess(
        dialect, python=sys.executable, log=folder / "engine.log", start_timeout_s=1.0
    )
    return HttpEngine(dialect, server, tiny_tokenizer(), context=99)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("sleep 60; true", r"not ready after 1 s \(.*\): set a larger engine\.start_timeout_s"),
        ("echo no such device; exit 3", "ended while it started(.|\n)*no such device"),
    ],
    ids=["hangs", "ends"],
)
def test_a_server_that_never_starts_is_given_up(folder: Path, words: str, complaint: str) -> None:
    engine = never_ready(folder, ["sh", "-c", words, str(folder)])

    async def work(engine: HttpEngine) -> None:
        asked = [engine.generate(PROMPT, LONG, KEY) for _ in range(3)]
        for error in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(error, EngineError)
            assert re.search(complaint, str(error))

    run(engine, work)


def test_a_server_ends_with_whoever_started_it_even_by_sigkill(folder: Path) -> None:
    script = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, os.environ["TESTS"])
from unit.test_http_engine import never_ready
folder = os.environ["FOLDER"]
engine = never_ready(Path(folder), ["sh", "-c", "(sleep 60; true) & sleep 60; true", folder])
engine._server.launch()
time.sleep(60)
"""
    tests = str(Path(__file__).parents[1])
    starter = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "TESTS": tests, "FOLDER": str(folder)}
    )
    wait_for(lambda: len(processes(folder)) == 3)  # the keeper and two shells
    starter.kill()
    starter.wait()
    wait_for(lambda: processes(folder) == [])


def wait_for(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
