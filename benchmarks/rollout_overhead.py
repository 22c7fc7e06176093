"""What a rollout costs in querl's own process, beside what engine and databases compute.

    python benchmarks/rollout_overhead.py --groups 128 --rounds 5 \
        model.path=FOLDER data.source=spider:FOLDER prompt.style=full prompt.values=sample

*Episodes* of two turns are answered at once by the golds, encoded beforehand: groups of 8, whose
samples begin alike, and as many episodes that all ask something of their own, as they were played
when each sample described, rendered and encoded its prompt for itself. *Answers* of 80 tokens, as
vLLM writes them, come from another process: with the collector of cycles as Python sets it, and as
a stream sets it while episodes run. Ways take turns in each round, and ratios are of the same
round; the first round, in which databases are looked at, is left out. Seconds are of this process's
CPU. With the package's own model and data: ``model.path=tiny data.source=demo``.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median

from aiohttp import web

from querl.config import Recipe, load_recipe
from querl.launch.engines import player_of
from querl.launch.local import Speaker, load_speaker
from querl.launch.tasks import choose_tasks
from querl.rollout.engine import RequestKey, Sampling
from querl.rollout.http_engine import HttpEngine
from querl.rollout.scripted import ScriptedEngine
from querl.rollout.server import RemoteServer
from querl.rollout.stream import COLLECT_AFTER
from querl.rollout.vllm import Vllm, VllmSettings
from querl.types import Completion, FinishReason, Task

GROUP_SIZE = 8
PROMPT_TOKENS, ANSWER_TOKENS = 900, 80
CONTEXT = 8192

Way = Callable[[], Awaitable[None]]


class Golds(ScriptedEngine):
    """Answers the n-th group by the n-th task's gold: first to try it, then as the solution."""

    def __init__(self, speaker: Speaker, tasks: Sequence[Task]) -> None:
        super().__init__(speaker.tokenizer, lambda _key, _prompt: "")
        self._said = [
            [
                self._encode(f"<think>so it is</think><{tag}>{task.gold_sql}</{tag}>")
                for tag in ("sql", "solution")
            ]
            for task in tasks
        ]

    def _encode(self, text: str) -> Completion:
        token_ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        return Completion(
            token_ids=token_ids,
            logprobs=(-1.0,) * len(token_ids),
            versions=(0,) * len(token_ids),
            finish_reason=FinishReason.STOP,
        )

    async def generate(
        self,
        prompt_ids: tuple[int, ...],  # noqa: ARG002
        sampling: Sampling,  # noqa: ARG002
        key: RequestKey,
    ) -> Completion:
        """What was encoded beforehand."""
        await asyncio.sleep(0)
        return self._said[key.group][key.turn]


async def cpu_s(way: Way) -> float:
    """Seconds of this process's CPU."""
    started = time.process_time()
    await way()
    return time.process_time() - started


async def take_turns(ways: Sequence[Way], num_rounds: int) -> list[list[float]]:
    """[way][round], without the first round."""
    rounds = [[await cpu_s(way) for way in ways] for _ in range(num_rounds + 1)]
    return [list(times) for times in zip(*rounds[1:], strict=True)]


async def play_episodes(recipe: Recipe, num_groups: int, num_rounds: int) -> list[list[float]]:
    """Seconds of a round: without sharing, and by the group."""
    speaker = load_speaker(recipe)
    tasks = choose_tasks(recipe)[0][:num_groups]
    keys = [
        RequestKey(0, 0, group, sample, 0)
        for group in range(num_groups)
        for sample in range(GROUP_SIZE)
    ]
    numbers = count()

    async with player_of(recipe, Golds(speaker, tasks), speaker.history, None) as player:

        async def by_the_group() -> None:
            await asyncio.gather(*(player.play(tasks[key.group], key) for key in keys))

        async def alone() -> None:
            own = [
                replace(tasks[key.group], question=f"{tasks[key.group].question} {next(numbers)}")
                for key in keys
            ]
            await asyncio.gather(
                *(player.play(task, key) for task, key in zip(own, keys, strict=True))
            )

        return await take_turns([alone, by_the_group], num_rounds)


async def ask_over_http(recipe: Recipe, num_requests: int, num_rounds: int) -> list[list[float]]:
    """Seconds of a round: with Python's collector, and with a stream's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])
    settings = VllmSettings(model="", dtype="bfloat16", context=CONTEXT, is_elsewhere=True)
    engine = HttpEngine(
        Vllm(settings),
        RemoteServer(f"http://127.0.0.1:{port}", start_timeout_s=60.0),
        load_speaker(recipe).tokenizer,
        context=CONTEXT,
        max_batch=num_requests,
        heartbeat_s=60.0,
    )
    prompt_ids = tuple(range(PROMPT_TOKENS))
    sampling = Sampling(max_tokens=ANSWER_TOKENS, stop=("</sql>", "</solution>"))

    def ask(threshold: int) -> Way:
        async def way() -> None:
            gc.set_threshold(threshold, 10, 10)
            keys = [RequestKey(0, 0, i, 0, 0) for i in range(num_requests)]
            await asyncio.gather(*(engine.generate(prompt_ids, sampling, key) for key in keys))

        return way

    try:
        return await take_turns([ask(700), ask(COLLECT_AFTER)], num_rounds)
    finally:
        await engine.close()
        server.kill()
        server.wait()


def serve(port: int) -> None:
    """Answer each request at once, as vLLM 0.26 writes it."""
    content = [
        {
            "token": f"token_id:{token_id}",
            "logprob": -0.123456789012345,
            "bytes": None,
            "top_logprobs": [
                {"token": f"token_id:{token_id}", "logprob": -0.123456789012345, "bytes": None}
            ],
        }
        for token_id in range(ANSWER_TOKENS)
    ]
    choice = {
        "index": 0,
        "logprobs": {"content": content},
        "finish_reason": "length",
        "token_ids": list(range(ANSWER_TOKENS)),
        "routed_experts": None,
    }
    answer = json.dumps({"request_id": "a", "choices": [choice], "prompt_logprobs": None}).encode()

    async def generate(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=answer, content_type="application/json")

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/inference/v1/generate", generate)
    app.router.add_get("/health", health)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


def show(name: str, times: list[list[float]], number: int) -> None:
    """Median milliseconds of one, and how many times as many the first way takes."""
    first, second = ([1000 * t / number for t in way] for way in times)
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    print(
        f"{name}: {median(first):.2f} and {median(second):.2f} ms of CPU each, "
        f"{median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", type=int, help="the part of the server: its port")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve)
        return
    path = Path(__file__).parents[1] / "recipes" / "spider-qwen-0.5b.toml"
    limit = f"data.max_samples={asked.groups}"
    recipe = load_recipe(path, (limit, *asked.overrides))
    gc.collect()
    gc.freeze()  # as in training
    num_episodes = asked.groups * GROUP_SIZE
    episodes = asyncio.run(play_episodes(recipe, asked.groups, asked.rounds))
    show("episodes, each alone and by the group", episodes, num_episodes)
    answers = asyncio.run(ask_over_http(recipe, num_episodes, asked.rounds))
    show("answers, with Python's collector and a stream's", answers, num_episodes)


if __name__ == "__main__":
    main()
