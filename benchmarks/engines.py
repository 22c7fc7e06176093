"""Engines side by side on one GPU: start, tokens a second, distance from the learner, weight sync.

Each variant has a policy, a learner and an engine of its own, as a run of the recipe with the
variant's settings would; prompts are Spider's, in groups of 8, without stop strings. One line of
JSON for each thing measured, when it is; what fails or outlasts ``--deadline`` says why, and the
next variant begins.

    python benchmarks/engines.py --variants vllm sglang hf vllm-lora --out engines.jsonl \
        model.path=MODEL data.source=spider:FOLDER

``sglang:engine.python=FILE`` is a setting for variants of that kind alone.

A model of 7B's shape with random weights is written once to FOLDER, with the tokenizer of MODEL:

    python benchmarks/engines.py --random 7b --into FOLDER model.path=MODEL
    python benchmarks/engines.py --variants vllm-lora --requests 256 --out engines.jsonl \
        model.path=FOLDER data.source=spider:FOLDER memory.checkpoint_activations=true
    python benchmarks/engines.py --variants vllm --requests 256 --out engines.jsonl \
        model.path=FOLDER data.source=spider:FOLDER memory.checkpoint_activations=true \
        optimizer.kind=adamw8bit optimizer.masters=stochastic

Without a GPU, the tests' small servers stand in for vLLM by ``vllm:engine.python=FILE``, where FILE
is a shell script that says ``shift 2; exec python tests/engine_server.py "$@"``, with
``model.path=tiny data.source=demo data.validation=val``.

``start``: seconds from the launch until one token was sampled, while the policy is loaded.
``rate``: all requests at once, up to ``--tokens`` each, the last of two goes. ``apart``: |engine -
learner| in nats a token. ``cycle``: what a colocated step does around its update, in its order; the
update is one of 64 completions with made-up advantages. ``sync``: new weights while awake.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from spider_step import Lines
from spider_work import read_recipe, read_work
from transformers import AutoModelForCausalLM, Qwen2Config
from tree_training import SHAPES

from querl.config import SERVERS, Recipe
from querl.errors import QuerlError
from querl.launch.engines import make_engine, make_server_engine
from querl.launch.local import Policy, load_policy, load_speaker, make_learner, model_path
from querl.rollout.engine import Engine, RequestKey, Sampling
from querl.trainer.full import FullLearner
from querl.trainer.model import load_tokenizer
from querl.types import Completion, Sample

VARIANTS = {
    "hf": ("engine.kind=hf", "engine.placement=shared", "engine.max_batch=256"),
    "vllm": ("engine.kind=vllm",),
    "vllm-lora": ("engine.kind=vllm", "lora.rank=32", "lora.alpha=64"),
    "sglang": ("engine.kind=sglang",),
    "sglang-lora": ("engine.kind=sglang", "lora.rank=32", "lora.alpha=64"),
}
GROUP = 8
NUM_COMPARED = 64


class Bench:
    """One variant: its learner and its engine, and what is asked of both."""

    def __init__(
        self, name: str, engine: Engine, learner: FullLearner, prompts: list[tuple[int, ...]]
    ) -> None:
        self.name = name
        self.engine = engine
        self.learner = learner
        self._prompts = prompts
        self._num_asked = 0

    async def sample(self, num: int, tokens: int) -> list[tuple[tuple[int, ...], Completion]]:
        """So many completions at once, each with its prompt."""
        self._num_asked += 1
        sampling = Sampling(max_tokens=tokens)
        self.engine.enter(num)

        async def one(number: int) -> tuple[tuple[int, ...], Completion]:
            group, sample = divmod(number, GROUP)
            prompt = self._prompts[group % len(self._prompts)]
            try:
                key = RequestKey(0, self._num_asked, group, sample, 0)
                return prompt, await self.engine.generate(prompt, sampling, key)
            finally:
                self.engine.leave(1)

        return list(await asyncio.gather(*(one(number) for number in range(num))))

    async def rate(self, num: int, tokens: int) -> dict[str, Any]:
        """Tokens a second from cold prompts, when kernels and graphs have been used before."""
        goes = []
        for _ in range(2):
            # forgets what the first go has cached of the prompts
            await self.engine.load_weights(self.learner.weights(), self.engine.version)
            start = time.perf_counter()
            said = await self.sample(num, tokens)
            seconds = time.perf_counter() - start
            generated = sum(len(completion.token_ids) for _, completion in said)
            goes.append((generated, seconds))
        return {
            "concurrent": num,
            "tokens": generated,
            "prompt_tokens": sum(len(prompt) for prompt, _ in said),
            "seconds": [seconds for _, seconds in goes],
            "tokens_per_s": generated / seconds,
        }

    async def apart(self, tokens: int) -> dict[str, Any]:
        """Engine against learner, both awake and with the same weights."""
        said = await self.sample(NUM_COMPARED, tokens)
        samples = [as_sample(number, *pair) for number, pair in enumerate(said)]
        found = await self.learner.logprobs(samples)
        distances = [
            abs(mine - theirs)
            for (_, completion), logprobs in zip(said, found, strict=True)
            for mine, theirs in zip(logprobs, completion.logprobs, strict=True)
        ]
        mean = sum(distances) / len(distances)
        return {"mean": mean, "max": max(distances), "tokens": len(distances)}

    async def sync(self, version: int) -> dict[str, Any]:
        """New weights, the engine awake."""
        start = time.perf_counter()
        await self.engine.load_weights(self.learner.weights(), version)
        return {"seconds": time.perf_counter() - start, "version": version}

    async def cycle(self, version: int, tokens: int) -> dict[str, Any]:
        """Sleep, update, publish, wake: seconds of each, and memory at its height."""
        said = await self.sample(NUM_COMPARED, tokens)
        samples = [as_sample(number, *pair) for number, pair in enumerate(said)]
        clock = Clock()
        await self.engine.sleep()
        clock.lap("engine_sleep")
        await self.learner.wake()
        clock.lap("learner_wake")
        await self.learner.update(samples)
        clock.lap("update")
        await self.engine.load_weights(self.learner.weights(), version)
        clock.lap("load")
        await self.learner.sleep()
        clock.lap("learner_sleep")
        await self.engine.wake()
        clock.lap("engine_wake")
        return {"version": version, "trained": sum(s.num_loss_tokens for s in samples)} | clock.laps


class Clock:
    """Seconds and memory of things done one after the other."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()
        self._reset()

    def lap(self, name: str) -> None:
        """What came before had this name."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.laps[f"{name}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        now = time.perf_counter()
        self.laps[f"{name}_s"], self._since = now - self._since, now
        self.laps |= {f"{name}_{key}": value for key, value in gpu_gib().items()}
        self._reset()

    def _reset(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


def gpu_gib() -> dict[str, float]:
    """What all processes together have of the GPU; nothing without one."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_gib": (total - free) / 2**30}


def as_sample(number: int, prompt: tuple[int, ...], completion: Completion) -> Sample:
    """A completion to learn from; in a group every other one was good."""
    num_prompt, num_said = len(prompt), len(completion.token_ids)
    length = num_prompt + num_said
    return Sample(
        group_id=number // GROUP,
        num_prompt_tokens=num_prompt,
        token_ids=prompt + completion.token_ids,
        loss_mask=(False,) * num_prompt + (True,) * num_said,
        sampled_logprobs=(0.0,) * num_prompt + completion.logprobs,
        advantages=(1.0 if number % 2 else -1.0,) * length,
        versions=(0,) * num_prompt + completion.versions,
    )


@asynccontextmanager
async def open_bench(
    name: str, recipe: Recipe, prompts: list[tuple[int, ...]], lines: Lines
) -> AsyncIterator[Bench]:
    """A variant whose engine has sampled a token; closes what it opened."""
    start = time.perf_counter()
    server: Engine | None = None
    if recipe.engine.kind in SERVERS:
        server, process = make_server_engine(recipe, load_speaker(recipe))
        process.launch()
    try:
        policy: Policy = await asyncio.to_thread(load_policy, recipe)
        loaded_s = time.perf_counter() - start
        with make_learner(recipe, policy) as learner:
            engine = server or make_engine(recipe, policy)
            bench = Bench(name, engine, learner, prompts)
            try:
                await bench.sample(1, 1)
                seconds = time.perf_counter() - start
                lines.write(
                    what="start", variant=name, seconds=seconds, policy_s=loaded_s, **gpu_gib()
                )
                yield bench
            finally:
                await engine.close()
    finally:
        if server is not None:
            await server.close()


async def measure(bench: Bench, args: argparse.Namespace, lines: Lines) -> None:
    """Everything of one variant, each thing with a deadline of its own."""
    works = [
        ("sync", lambda: bench.sync(1)),
        *(("rate", lambda num=num: bench.rate(num, args.tokens)) for num in args.requests),
        ("apart", lambda: bench.apart(args.tokens)),
        *(("cycle", lambda k=k: bench.cycle(k, args.tokens)) for k in range(2, 2 + args.cycles)),
        ("apart", lambda: bench.apart(args.tokens)),
        ("sync", lambda: bench.sync(2 + args.cycles)),
    ]
    for what, work in works:
        async with asyncio.timeout(args.deadline):
            found = await work()
        lines.write(what=what, variant=bench.name, **found)


async def compare(args: argparse.Namespace) -> None:
    """All variants, one after the other."""
    lines = Lines(args.out)
    lines.write(
        what="machine",
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        torch=torch.__version__,
        overrides=args.overrides,
    )
    for name in args.variants:
        recipe = read_recipe(args.recipe, settings_of(name, args.overrides), num_steps=100)
        speaker = load_speaker(recipe)
        work = await read_work(recipe)
        prompts = [speaker.history.start(messages) for messages in work.messages]
        try:
            async with (
                asyncio.timeout(args.deadline * 8),
                open_bench(name, recipe, prompts, lines) as bench,
            ):
                await measure(bench, args, lines)
        except (QuerlError, TimeoutError, torch.OutOfMemoryError) as error:
            why = str(error) or f"nothing within {args.deadline:g} s"
            lines.write(what="failed", variant=name, why=why[-2000:])
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def settings_of(name: str, overrides: list[str]) -> list[str]:
    """A variant's, and of the overrides those for all and those for variants of its kind."""
    found = ["memory.compile=false", *VARIANTS[name]]
    for override in overrides:
        kind, colon, setting = override.partition(":")
        is_for_kind = bool(colon) and "=" not in kind
        if is_for_kind and name.split("-")[0] != kind:
            continue
        found.append(setting if is_for_kind else override)
    return found


def write_random(shape: str, recipe: Recipe, folder: Path) -> None:
    """A model of that shape in bfloat16, made on the GPU where there is one."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(model_path(recipe))
    config = Qwen2Config(
        **SHAPES[shape],
        max_position_embeddings=32768,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Compare, or write a model to compare with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="settings of the recipe: section.key=value")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/spider-qwen-0.5b.toml"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["vllm"])
    parser.add_argument("--requests", nargs="+", type=int, default=[256, 1024], help="at once")
    parser.add_argument("--tokens", type=int, default=128, help="of a completion, at most")
    parser.add_argument("--cycles", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds for each thing")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--random", choices=SHAPES, help="only write such a model --into a folder")
    parser.add_argument("--into", type=Path)
    args = parser.parse_args()
    if args.random:
        write_random(args.random, read_recipe(args.recipe, args.overrides, num_steps=1), args.into)
    elif args.out:
        asyncio.run(compare(args))
    else:
        parser.error("--out is needed")


if __name__ == "__main__":
    main()
