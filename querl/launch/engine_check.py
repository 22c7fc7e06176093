"""Does an engine keep its promises on this machine? The short form of the engines' contract.

With the recipe's model and settings: the long form, ``tests/engine_laws.py``, is for developers.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from querl.errors import EngineError
from querl.launch.engines import open_player
from querl.launch.local import load_policy, make_learner
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
LENGTH = 24  # tokens of a completion
NUDGE = 0.05  # of a weight's deviation: far enough that every log-prob moves


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


async def _repeats(bench: Bench) -> tuple[bool, str]:
    first, again = await bench.ask(greedy=True), await bench.ask(greedy=True)
    return first.token_ids == again.token_ids, f"{len(first.token_ids)} tokens"


async def _follows_seeds(bench: Bench) -> tuple[bool, str]:
    first, again = await bench.ask(sample=1), await bench.ask(sample=1)
    others = {completion.token_ids for completion in await bench.ask_many(8)}
    is_kept = first.token_ids == again.token_ids and len(others) > 1
    return is_kept, f"{len(others)} different of 8 keys"


async def _keeps_stops(bench: Bench) -> tuple[bool, str]:
    said = await bench.ask(greedy=True)
    text = bench.history.text(said)
    if len(text) < 4:
        return True, f"nothing to stop at: the model says {text!r}"
    stop = text[len(text) // 2 : len(text) // 2 + 2]
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
    before = await bench.ask()
    _nudge(bench.learner)
    started = time.monotonic()
    await bench.engine.load_weights(bench.learner.weights(), version=1)
    seconds = time.monotonic() - started
    after = await bench.ask()
    apart = await bench.distance([after])
    has_moved = after.logprobs != before.logprobs
    is_kept = has_moved and set(after.versions) == {1} and apart <= bench.tolerance
    moved = "moved" if has_moved else "not moved"
    return is_kept, f"in {seconds:.2f} s; {moved}, {apart:.4f} nats a token from the learner"


async def _sleeps_and_wakes(bench: Bench) -> tuple[bool, str]:
    times = [time.monotonic()]
    await bench.engine.sleep()
    times.append(time.monotonic())
    _nudge(bench.learner)
    await bench.engine.load_weights(bench.learner.weights(), version=2)
    times.append(time.monotonic())
    await bench.engine.wake()
    times.append(time.monotonic())
    completion = await bench.ask()
    apart = await bench.distance([completion])
    slept, loaded, woke = (b - a for a, b in pairwise(times))
    is_kept = set(completion.versions) == {2} and apart <= bench.tolerance
    return is_kept, (
        f"asleep in {slept:.2f} s, loaded in {loaded:.2f}, awake in {woke:.2f}; {apart:.4f} nats"
    )


@torch.no_grad()
def _nudge(learner: FullLearner) -> None:
    """Move what is trained, an adapter that is still zero too."""
    dice = torch.Generator().manual_seed(0)
    for weight in learner.weights().module.parameters():
        if weight.requires_grad:
            noise = torch.randn(weight.shape, generator=dice).to(weight)
            weight.add_(noise, alpha=NUDGE * max(float(weight.float().std()), 0.01))


PROMISES: dict[str, Callable[[Bench], Awaitable[tuple[bool, str]]]] = {
    "its log-probabilities are the learner's": _tells_logprobs,
    "greedy sampling repeats itself": _repeats,
    "a key decides what is sampled": _follows_seeds,
    "stop strings end a completion and stay in it": _keeps_stops,
    "cancelled calls leave it whole": _forgets_cancelled,
    "new weights are what it samples from, and no cache survives": _takes_weights,
    "it sleeps, is given weights, and wakes": _sleeps_and_wakes,
}
