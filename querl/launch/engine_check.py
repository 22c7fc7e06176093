"""Does an engine keep its promises on this machine? The short form of the engines' contract.

With the recipe's model and settings: the long form, ``tests/engine_laws.py``, is for developers.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from querl.errors import EngineError
from querl.launch.engines import open_player
from querl.launch.local import check_base, load_policy, make_learner
from querl.launch.needs import check_server
from querl.rollout.engine import RequestKey, Sampling
from querl.rollout.probe import mean_distance, sample_of
from querl.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from querl.config import Recipe
    from querl.rollout.engine import Engine
    from querl.rollout.history import History
    from querl.trainer.full import FullLearner
    from querl.types import Completion

KEY = RequestKey(seed=0, step=0, group=0, sample=0, turn=0)
SEEDED = "enable_deterministic_inference"  # the option of an SGLang that follows seeds
LENGTH = 24  # tokens of a completion
NUDGE = 0.05  # of a weight's deviation, doubled until the learner has moved FAR
MOST_NUDGES = 12
FAR = 0.2  # nats a token: well above what the two are apart by rounding
TIE = 0.25  # nats: rounded to bfloat16, tokens so close take turns as the likeliest


@dataclass(frozen=True, slots=True)
class Finding:
    """One promise, whether it was kept, and what was seen."""

    promise: str
    is_kept: bool
    seen: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """An engine, the learner whose weights it samples from, and something to say to it."""

    engine: Engine
    learner: FullLearner
    history: History
    prompt_ids: tuple[int, ...]
    temperature: float
    tolerance: float  # nats a token, on the mean
    follows_seeds: bool

    async def ask(self, *, sample: int = 0, greedy: bool = False, stop: str = "") -> Completion:
        """One completion; ``sample`` chooses its random numbers."""
        sampling = Sampling(
            max_tokens=LENGTH,
            temperature=0.0 if greedy else self.temperature,
            stop=(stop,) if stop else (),
        )
        return await self.engine.generate(self.prompt_ids, sampling, replace(KEY, sample=sample))

    async def ask_many(self, number: int) -> list[Completion]:
        """Completions of as many keys, all at once."""
        return await asyncio.gather(*(self.ask(sample=sample) for sample in range(number)))

    async def distance(self, completions: list[Completion]) -> float:
        """Mean absolute difference between engine and learner, nats a token."""
        samples = [sample_of(self.prompt_ids, completion) for completion in completions]
        found = await self.learner.logprobs(samples)
        return mean_distance([completion.logprobs for completion in completions], found)


async def check_engine(recipe: Recipe) -> AsyncIterator[Finding]:
    """Start the recipe's engine and hold it to its promises, one after another.

    An EngineError is a finding, and the last. Raises what the recipe's model or data raise.
    """
    check_base(recipe)
    check_server(recipe)
    started = time.monotonic()
    policy = load_policy(recipe)
    with make_learner(recipe, policy) as learner:
        async with open_player(recipe, policy) as player:
            bench = Bench(
                engine=player.engine,
                learner=learner,
                history=player.history,
                prompt_ids=player.history.start([{"role": "user", "content": "How many rows?"}]),
                temperature=recipe.engine.temperature,
                tolerance=recipe.algorithm.max_dlogprob or 0.25,
                follows_seeds=_follows_seeds(recipe),
            )
            try:
                await bench.engine.load_weights(learner.weights(), version=0)
                await bench.ask()
                seconds = time.monotonic() - started
                yield Finding("it starts and answers", True, f"after {seconds:.1f} s")
                for promise, check in PROMISES.items():
                    is_kept, seen = await check(bench)
                    yield Finding(promise, is_kept, seen)
            except EngineError as error:
                yield Finding("it answers what it is asked", False, str(error))


async def _tells_logprobs(bench: Bench) -> tuple[bool, str]:
    completions = await bench.ask_many(16)
    apart = await bench.distance(completions)
    return apart <= bench.tolerance, f"{apart:.4f} nats a token apart, {bench.tolerance:g} allowed"


def _follows_seeds(recipe: Recipe) -> bool:
    """SGLang passes over them unless it is started not to."""
    options = {name.replace("-", "_"): value for name, value in recipe.engine.options.items()}
    return recipe.engine.kind != "sglang" or bool(options.get(SEEDED))


async def _is_greedy(bench: Bench) -> tuple[bool, str]:
    first, *others = [await bench.ask(sample=sample, greedy=True) for sample in range(4)]
    is_kept = all(_same_but_for_ties(first, other) for other in others)
    num_same = sum(other.token_ids == first.token_ids for other in others)
    return is_kept, f"{len(first.token_ids)} tokens, the same {num_same} of 3 times"


def _same_but_for_ties(one: Completion, other: Completion) -> bool:
    """Whether the first tokens that differ are about as likely; what follows may be anything."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    place = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
    if place is None:
        return len(one.token_ids) == len(other.token_ids)
    return abs(one.logprobs[place] - other.logprobs[place]) <= TIE


async def _keeps_keys(bench: Bench) -> tuple[bool, str]:
    first, again = await bench.ask(sample=1), await bench.ask(sample=1)
    others = {completion.token_ids for completion in await bench.ask_many(8)}
    seen = f"{len(others)} different of 8 keys"
    if not bench.follows_seeds:
        return len(others) > 1, (
            f"{seen}; not promised: sglang samples anew each time, but with the slower "
            f"engine.options={{{SEEDED}=true}}"
        )
    return first.token_ids == again.token_ids and len(others) > 1, seen


async def _keeps_stops(bench: Bench) -> tuple[bool, str]:
    text = bench.history.text(await bench.ask(greedy=True))
    spelt = re.findall("[ -~]{1,3}", text)  # bytes that are no text decode differently
    if not spelt:
        return True, f"nothing to stop at: the model says {text!r}"
    stop = spelt[len(spelt) // 2]
    stopped = await bench.ask(greedy=True, stop=stop)
    is_kept = stopped.finish_reason is FinishReason.STOP and stop in bench.history.text(stopped)
    return is_kept, f"stop {stop!r}: {stopped.finish_reason}"


async def _forgets_cancelled(bench: Bench) -> tuple[bool, str]:
    calls = [asyncio.create_task(bench.ask(sample=sample)) for sample in range(8)]
    await asyncio.sleep(0.01)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    return len((await bench.ask()).token_ids) > 0, "8 calls cancelled, the next one answered"


async def _takes_weights(bench: Bench) -> tuple[bool, str]:
    moved = await _move(bench, await bench.ask_many(4))
    started = time.monotonic()
    await bench.engine.load_weights(bench.learner.weights(), version=1)
    seconds = time.monotonic() - started
    is_kept, seen = await _has_arrived(bench, moved, version=1)
    return is_kept, f"in {seconds:.2f} s; {seen}"


async def _sleeps_and_wakes(bench: Bench) -> tuple[bool, str]:
    completions = await bench.ask_many(4)
    times = [time.monotonic()]
    await bench.engine.sleep()
    times.append(time.monotonic())
    moved = await _move(bench, completions)
    times.append(time.monotonic())
    await bench.engine.load_weights(bench.learner.weights(), version=2)
    times.append(time.monotonic())
    await bench.engine.wake()
    times.append(time.monotonic())
    is_kept, seen = await _has_arrived(bench, moved, version=2)
    slept, _, loaded, woke = (b - a for a, b in pairwise(times))
    return is_kept, f"asleep in {slept:.2f} s, loaded in {loaded:.2f}, awake in {woke:.2f}; {seen}"


async def _has_arrived(bench: Bench, moved: float, *, version: int) -> tuple[bool, str]:
    """Whether the engine is nearer to the learner than to what the learner was before."""
    completions = await bench.ask_many(4)
    apart = await bench.distance(completions)
    versions = {version for completion in completions for version in completion.versions}
    is_kept = versions <= {version} and apart <= min(bench.tolerance, moved / 2)
    return is_kept, f"the learner moved by {moved:.4f} nats a token, and is {apart:.4f} apart"


async def _move(bench: Bench, completions: list[Completion]) -> float:
    """Change the learner until it thinks otherwise of these; by how much, in nats a token."""
    samples = [sample_of(bench.prompt_ids, completion) for completion in completions]
    before = await bench.learner.logprobs(samples)
    moved = 0.0
    for number in range(MOST_NUDGES):
        _nudge(bench.learner, NUDGE * 2**number)
        moved = mean_distance(before, await bench.learner.logprobs(samples))
        if moved >= FAR:
            break
    return moved


@torch.no_grad()
def _nudge(learner: FullLearner, share: float) -> None:
    """Move what is trained, an adapter that is still zero too."""
    module = learner.weights().module
    dice = torch.Generator(module.device).manual_seed(0)
    for weight in module.parameters():
        if weight.requires_grad:
            noise = torch.randn(
                weight.shape, generator=dice, device=weight.device, dtype=weight.dtype
            )
            weight.add_(noise, alpha=share * max(float(weight.float().std()), 0.01))


PROMISES: dict[str, Callable[[Bench], Awaitable[tuple[bool, str]]]] = {
    "its log-probabilities are the learner's": _tells_logprobs,
    "greedy sampling repeats itself, whatever the key": _is_greedy,
    "a key decides what is sampled": _keeps_keys,
    "stop strings end a completion and stay in it": _keeps_stops,
    "cancelled calls leave it whole": _forgets_cancelled,
    "new weights are what it samples from, and no cache survives": _takes_weights,
    "it sleeps, is given weights, and wakes": _sleeps_and_wakes,
}
