"""The SGLang engine over a small real server of its routes: ``tests/engine_server_sglang.py``."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from engines import SmallSglang, processes, save_policy, small_decoder
from tiny_policy import tiny_tokenizer
from transformers import PreTrainedModel

from querl.env.prompts import Prompts, PromptStyle
from querl.env.schema_text import DescribedSchemas, ShownValues
from querl.env.text2sql import Text2Sql
from querl.env.wire import ACTION_STOPS
from querl.errors import ConfigError, EngineError
from querl.rollout.chat import ChatFormat
from querl.rollout.engine import RequestKey, Sampling
from querl.rollout.episode import EpisodeLimits, run_episode
from querl.rollout.history import HISTORIES
from querl.rollout.http import Http
from querl.rollout.http_engine import HttpEngine
from querl.rollout.pickled import buckets
from querl.rollout.server import RemoteServer, ServerProcess, wait_until_ready
from querl.rollout.sglang import Sglang, SglangSettings
from querl.sql.schema import SchemaStyle
from querl.sql.worker import SqlitePool
from querl.trainer.lora import LoraSettings, add_adapter
from querl.trainer.weights import PublishedWeights
from querl.types import Completion, FinishReason, Task

TOKENIZER = tiny_tokenizer()
CONTEXT = 1024
PROMPT = tuple(TOKENIZER.encode("SELECT name FROM city"))
KEY = RequestKey(seed=0, step=0, group=0, sample=0, turn=0)


def decoder(seed: int = 0) -> PreTrainedModel:
    return small_decoder(seed, context=CONTEXT)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(decoder(), tmp_path_factory.mktemp("model"))


def settings(model_folder: Path, **changed: Any) -> SglangSettings:
    return SglangSettings(
        model=str(model_folder), dtype="float32", context=CONTEXT, rank=8, **changed
    )


@pytest.fixture(scope="module")
def full_url(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server for all weights."""
    full = replace(settings(model_folder), rank=0)
    yield from running(full, tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def adapter_url(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server for adapters."""
    yield from running(settings(model_folder), tmp_path_factory.mktemp("log"))


def running(served: SglangSettings, folder: Path) -> Iterator[str]:
    dialect = SmallSglang(served)
    server = ServerProcess(dialect, python=sys.executable, log=folder / "log")

    async def ready() -> None:
        http = Http(server.url)
        try:
            await wait_until_ready(server, dialect, http)
        finally:
            await http.close()

    server.launch()
    try:
        asyncio.run(ready())
        yield server.url
    finally:
        asyncio.run(server.kill())


def sample(url: str, served: SglangSettings, work: Callable[[HttpEngine], Awaitable[Any]]) -> Any:
    """What ``work`` makes of an engine at ``url``, whose weights are then those of the folder."""
    engine = HttpEngine(
        Sglang(served), RemoteServer(url, start_timeout_s=30), TOKENIZER, context=CONTEXT
    )

    async def go() -> Any:
        try:
            if not served.rank:
                await engine.load_weights(PublishedWeights(decoder()), version=0)
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(go())


def expected(
    model: PreTrainedModel, completion: Completion, prompt: tuple[int, ...] = PROMPT, t: float = 1.0
) -> list[float]:
    ids = torch.tensor([prompt + completion.token_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    chosen = torch.tensor(completion.token_ids)
    return (logits / t).log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()


@pytest.fixture
def full(model_folder: Path) -> SglangSettings:
    return replace(settings(model_folder), rank=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_distribution_sampled_from(
    full_url: str, full: SglangSettings, temperature: float
) -> None:
    sampling = Sampling(max_tokens=12, temperature=temperature)
    completion = sample(full_url, full, lambda engine: engine.generate(PROMPT, sampling, KEY))
    assert len(completion.token_ids) == 12
    assert completion.logprobs == pytest.approx(
        expected(decoder(), completion, t=temperature), abs=1e-5
    )


def test_a_stop_string_of_more_tokens_than_when_encoded_still_ends_a_completion(
    full_url: str, full: SglangSettings
) -> None:
    async def work(engine: HttpEngine) -> tuple[Completion, str, Completion]:
        whole = await engine.generate(PROMPT, Sampling(max_tokens=40), KEY)
        # three sampled tokens whose text has an encoding of one or two
        for first in range(len(whole.token_ids) - 3):
            stop = TOKENIZER.decode(list(whole.token_ids[first : first + 3]))
            assert isinstance(stop, str)
            if stop.isascii() and len(TOKENIZER.encode(stop)) == 1:
                break
        sampling = Sampling(max_tokens=40, stop=(stop,))
        return whole, stop, await engine.generate(PROMPT, sampling, KEY)

    whole, stop, cut = sample(full_url, full, work)
    assert cut.finish_reason is FinishReason.STOP
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert stop in TOKENIZER.decode(list(cut.token_ids))
    assert stop not in TOKENIZER.decode(list(cut.token_ids[:-1]))


def test_an_end_id_of_the_history_ends_a_completion_and_is_kept(
    full_url: str, full: SglangSettings
) -> None:
    ends = tuple(range(40, 140))
    found = sample(
        full_url,
        replace(full, end_ids=ends),
        lambda engine: engine.generate(PROMPT, Sampling(max_tokens=60), KEY),
    )
    assert found.finish_reason is FinishReason.END
    assert found.token_ids[-1] in ends
    assert set(ends).isdisjoint(found.token_ids[:-1])


def test_top_p_is_refused_for_it_would_falsify_logprobs(
    full_url: str, full: SglangSettings
) -> None:
    with pytest.raises(ConfigError, match=r"engine\.top_p=0\.9"):
        sample(
            full_url,
            full,
            lambda engine: engine.generate(PROMPT, Sampling(max_tokens=2, top_p=0.9), KEY),
        )


@pytest.mark.parametrize("bucket_bytes", [1, 2**30])
def test_loaded_weights_are_sampled_from_and_no_prefix_survives(
    full_url: str, full: SglangSettings, bucket_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("querl.rollout.sglang.BUCKET_BYTES", bucket_bytes)
    other = decoder(seed=1)

    async def work(engine: HttpEngine) -> Completion:
        await engine.generate(PROMPT, Sampling(max_tokens=4), KEY)
        await engine.load_weights(PublishedWeights(other), version=7)
        return await engine.generate(PROMPT, Sampling(max_tokens=8), KEY)

    found = sample(full_url, full, work)
    assert set(found.versions) == {7}
    assert found.logprobs == pytest.approx(expected(other, found), abs=1e-5)


def test_an_engine_sleeps_loses_its_weights_and_samples_again(
    full_url: str, full: SglangSettings
) -> None:
    other = decoder(seed=2)

    async def work(engine: HttpEngine) -> tuple[Completion, Completion]:
        await engine.sleep()
        await engine.load_weights(PublishedWeights(other), version=1)
        await engine.wake()
        loaded = await engine.generate(PROMPT, Sampling(max_tokens=6), KEY)
        await engine.sleep()
        await engine.wake()
        return loaded, await engine.generate(PROMPT, Sampling(max_tokens=6), KEY)

    for found in sample(full_url, full, work):
        assert found.logprobs == pytest.approx(expected(other, found), abs=1e-5)


def test_weights_that_were_never_published_are_kept_over_a_sleep(
    full_url: str, full: SglangSettings
) -> None:
    async def work(engine: HttpEngine) -> Completion:
        fresh = HttpEngine(
            Sglang(full), RemoteServer(full_url, start_timeout_s=30), TOKENIZER, context=CONTEXT
        )
        try:
            await fresh.sleep()
            await fresh.wake()
            return await fresh.generate(PROMPT, Sampling(max_tokens=6), KEY)
        finally:
            await fresh.close()

    found = sample(full_url, full, work)
    assert found.logprobs == pytest.approx(expected(decoder(), found), abs=1e-5)


def test_a_completion_that_an_update_cuts_goes_on_with_the_new_weights(
    full_url: str, full: SglangSettings
) -> None:
    old, new = decoder(), decoder(seed=3)

    async def work(engine: HttpEngine) -> Completion:
        long = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=400), KEY))
        await engine.generate(PROMPT, Sampling(max_tokens=5), replace(KEY, sample=1))
        await engine.load_weights(PublishedWeights(new), version=1)
        return await long

    found = sample(full_url, full, work)
    num_old, num_new = found.versions.count(0), found.versions.count(1)
    assert min(num_old, num_new) > 0
    assert found.versions == (0,) * num_old + (1,) * num_new
    assert found.logprobs[:num_old] == pytest.approx(expected(old, found)[:num_old], abs=1e-5)
    assert found.logprobs[num_old:] == pytest.approx(expected(new, found)[num_old:], abs=1e-5)


@pytest.mark.parametrize("is_rank_stable", [False, True])
def test_an_adapter_arrives_with_its_scale(
    adapter_url: str, model_folder: Path, is_rank_stable: bool
) -> None:
    learner = decoder()
    shape = LoraSettings(rank=4, alpha=16.0, is_rank_stable=is_rank_stable)
    add_adapter(learner, shape, base=model_folder)

    async def work(engine: HttpEngine) -> list[tuple[Completion, list[float]]]:
        found = []
        for version in (1, 2):  # the second drives the first out
            for name, weight in learner.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(weight, std=0.1 * version)
            await engine.sleep()
            await engine.wake()
            await engine.load_weights(PublishedWeights(learner), version)
            completion = await engine.generate(PROMPT, Sampling(max_tokens=8), KEY)
            found.append((completion, expected(learner, completion)))
        return found

    base = decoder()
    for completion, told in sample(adapter_url, settings(model_folder), work):
        assert completion.logprobs == pytest.approx(told, abs=1e-5)
        assert completion.logprobs != pytest.approx(expected(base, completion), abs=1e-2)


def test_an_adapter_that_the_server_has_no_room_for_is_an_error(
    adapter_url: str, model_folder: Path
) -> None:
    learner = decoder()
    add_adapter(learner, LoraSettings(rank=16), base=model_folder)
    with pytest.raises(EngineError, match="load_lora_adapter_from_tensors refused: 400"):
        sample(
            adapter_url,
            settings(model_folder),
            lambda engine: engine.load_weights(PublishedWeights(learner), version=1),
        )


@pytest.mark.slow
def test_a_server_that_was_killed_gets_its_adapter_again(tmp_path: Path) -> None:
    learner = decoder()
    folder = save_policy(learner, tmp_path / "base")
    add_adapter(learner, LoraSettings(rank=4), base=folder)
    for name, weight in learner.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    dialect = SmallSglang(settings(folder))
    server = ServerProcess(dialect, python=sys.executable, log=tmp_path / "log")
    engine = HttpEngine(dialect, server, TOKENIZER, context=CONTEXT)

    async def go() -> Completion:
        try:
            await engine.load_weights(PublishedWeights(learner), version=3)
            (process,) = processes(folder, of_server=True)
            os.kill(process, signal.SIGKILL)
            return await engine.generate(PROMPT, Sampling(max_tokens=8), KEY)
        finally:
            await engine.close()

    found = asyncio.run(go())
    assert engine.num_restarts == 1
    assert set(found.versions) == {3}
    assert found.logprobs == pytest.approx(expected(learner, found), abs=1e-5)


@pytest.mark.parametrize("name", HISTORIES)
def test_episodes_of_every_history_are_exact(
    full_url: str, full: SglangSettings, name: str, tmp_path: Path
) -> None:
    database = tmp_path / "map.sqlite"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE city (id INTEGER PRIMARY KEY, name TEXT)")
    connection.close()
    task = Task(id="t", question="Which cities?", database=str(database))
    history = HISTORIES[name](ChatFormat(TOKENIZER))

    async def work(engine: HttpEngine) -> Any:
        async with SqlitePool(num_workers=1) as pool:
            schemas = DescribedSchemas(pool, style=SchemaStyle.COMPACT, values=ShownValues.NONE)
            return await run_episode(
                Text2Sql(pool, Prompts(schemas, PromptStyle.SHORT), max_turns=2),
                engine,
                history,
                task=task,
                sampling=Sampling(max_tokens=1, stop=ACTION_STOPS),
                limits=EpisodeLimits(max_prompt=500, max_turn_tokens=24, max_input=CONTEXT - 24),
                key=KEY,
            )

    ends = (history.end_id, *range(40, 140))  # random weights would hardly ever end a turn
    trajectory = sample(full_url, replace(full, end_ids=ends), work)
    assert trajectory.error is None
    assert len(trajectory.turns) == 2, "what they say is no action: a correction follows"
    model = decoder()
    first, second = trajectory.turns
    if history.is_append_only:
        before = first.prompt_ids + first.completion.token_ids
        assert second.prompt_ids[: len(before)] == before
    for turn in trajectory.turns:
        told = expected(model, turn.completion, turn.prompt_ids)
        assert turn.completion.logprobs == pytest.approx(told, abs=1e-5)


# --- without a model


def test_a_request_that_a_pause_met_before_it_ran_is_asked_again() -> None:
    answers = [
        web.json_response({"error": {"message": "Request 1 was aborted"}}, status=499),
        web.json_response(
            {
                "meta_info": {
                    "finish_reason": {"type": "length", "length": 1},
                    "output_token_logprobs": [[-0.5, 7, None]],
                }
            }
        ),
    ]

    async def generate(_: web.Request) -> web.Response:
        return answers.pop(0)

    async def go() -> Completion:
        app = web.Application()
        app.router.add_get("/health", health)
        app.router.add_post("/generate", generate)
        async with TestServer(app) as server:
            engine = HttpEngine(
                Sglang(SglangSettings(model="m", dtype="bfloat16", context=64)),
                RemoteServer(str(server.make_url("")), start_timeout_s=30),
                TOKENIZER,
                context=64,
            )
            try:
                return await engine.generate((1, 2), Sampling(max_tokens=1), KEY)
            finally:
                await engine.close()

    assert asyncio.run(go()).token_ids == (7,)


async def health(_: web.Request) -> web.Response:
    return web.Response()


def test_options_win_over_our_flags_and_false_leaves_one_out() -> None:
    served = SglangSettings(
        model="m",
        dtype="bfloat16",
        context=64,
        rank=16,
        options={"attention_backend": "fa3", "enable_memory_saver": False, "disable_radix": True},
    )
    command = list(Sglang(served).command(python="py", port=7))
    assert command[:3] == ["py", "-m", "sglang.launch_server"]
    assert command[command.index("--attention-backend") + 1] == "fa3"
    assert "--enable-memory-saver" not in command
    assert "--disable-radix" in command
    assert "--quantization" not in command
    targets = command.index("--lora-target-modules")
    assert command[targets + 1 : targets + 3] == ["q_proj", "k_proj"]


def test_graphs_are_captured_for_every_batch_that_there_may_be() -> None:
    def command(max_batch: int) -> list[str]:
        served = SglangSettings(model="m", dtype="bfloat16", context=64, max_batch=max_batch)
        return list(Sglang(served).command(python="py", port=7))

    assert "--cuda-graph-max-bs" not in command(256)  # its own suit the GPU
    words = command(1024)
    assert words[words.index("--cuda-graph-max-bs") + 1] == "1024"


def test_broken_numbers_are_an_error() -> None:
    told = {"finish_reason": {"type": "length"}, "output_token_logprobs": [[None, 3, None]]}
    dialect = Sglang(SglangSettings(model="m", dtype="bfloat16", context=64))
    with pytest.raises(EngineError, match="not numbers"):
        dialect.piece({"meta_info": told})


def test_a_request_that_was_cut_while_it_waited_has_sampled_nothing() -> None:
    told = {"finish_reason": {"type": "abort", "message": "Abort in waiting queue"}}
    piece = Sglang(SglangSettings(model="m", dtype="bfloat16", context=64)).piece(
        {"meta_info": told}
    )
    assert piece.token_ids == ()
    assert piece.finish is None


def test_buckets_hold_every_tensor_once_and_no_more_bytes_than_allowed() -> None:
    tensors = [(str(i), torch.zeros(size)) for i, size in enumerate((4, 5, 30, 1, 1))]
    found = list(buckets(tensors, max_bytes=36))
    assert [[name for name, _ in bucket] for bucket in found] == [["0", "1"], ["2"], ["3", "4"]]
