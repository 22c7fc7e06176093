"""After each publish, a question: does the engine sample from the weights that the learner has?

The same prompt, keys and length each time. The learner computes what the engine says of its tokens:
they agree within a tolerance, and where the learner's view of the last answer has moved, what the
engine says without chance may not be the same to the last bit. That is asked first, and alone:
SGLang's chance follows no seed, and what a GPU computes hangs on the batch and on what is cached.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from querl.errors import EngineError
from querl.metrics import Metrics
from querl.rollout.engine import RequestKey, Sampling
from querl.types import Sample

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from querl.rollout.engine import Engine
    from querl.types import Completion

    Logprobs = Callable[[Sequence[Sample]], Awaitable[list[list[float]]]]

PROBE_GROUP = -(2**40)  # below the groups of training and of evaluation: no key is met twice
NUM_SAMPLES = 4
MAX_TOKENS = 16  # of each
MOVED = 1e-3  # nats a token: less may be lost to rounding on its way into the engine


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine sampled, with and without chance, and its log-probs [N][C] of the former."""

    greedy: Sample
    samples: tuple[Sample, ...]
    logprobs: tuple[tuple[float, ...], ...]


class Probe:
    """Asks ``engine`` for a greedy and ``NUM_SAMPLES`` other completions of one prompt."""

    def __init__(
        self,
        engine: Engine,
        logprobs: Logprobs,
        prompt_ids: tuple[int, ...],
        *,
        temperature: float,
        tolerance: float,
    ) -> None:
        self._engine = engine
        self._logprobs = logprobs
        self._prompt_ids = prompt_ids
        self._sampling = Sampling(max_tokens=MAX_TOKENS, temperature=temperature)
        self._tolerance = tolerance
        self._asked: Answer | None = None  # of this version, to be compared
        # the last answer that was another than the one before, and what the learner said of it then
        self._last: tuple[Answer, list[list[float]]] | None = None

    async def ask(self) -> None:
        """Let the engine sample; its memory and weights are awake."""
        keys = [RequestKey(0, 0, PROBE_GROUP, sample, 0) for sample in range(NUM_SAMPLES)]
        sure = replace(self._sampling, temperature=0.0)
        greedy = await self._engine.generate(self._prompt_ids, sure, keys[0])
        completions = await asyncio.gather(
            *(self._engine.generate(self._prompt_ids, self._sampling, key) for key in keys)
        )
        self._asked = Answer(
            greedy=sample_of(self._prompt_ids, greedy),
            samples=tuple(sample_of(self._prompt_ids, completion) for completion in completions),
            logprobs=tuple(completion.logprobs for completion in completions),
        )

    async def compare(self) -> Metrics:
        """Hold what was asked against the learner, whose weights are awake and still the same.

        Raises EngineError where the two are further apart than the tolerance (in nats a token), and
        where the learner has moved since the engine's answer last changed.
        """
        metrics = Metrics()
        asked, self._asked = self._asked, None
        if asked is None:
            return metrics
        now = await self._logprobs(asked.samples)
        apart = mean_distance(asked.logprobs, now)
        metrics.add_mean("probe/abs_dlogprob", apart)
        if self._last is not None:
            last, then = self._last
            # alone, as it was computed then: in a row with others bf16 rounds to 0.006 nats away
            moved = mean_distance(then, await self._logprobs(last.samples))
            metrics.add_mean("probe/moved", moved)
            if moved > MOVED and asked.greedy == last.greedy:
                raise EngineError(
                    f"the learner's weights moved by {moved:.4f} nats a token on a probe, and the "
                    "engine answers as before: weights or adapter did not reach it"
                )
        if self._tolerance and not apart <= self._tolerance:  # nor where it is no number
            raise EngineError(
                f"engine and learner are {apart:.3f} nats a token apart on a probe, "
                f"algorithm.max_dlogprob={self._tolerance:g}: the engine has other weights, "
                "another tokenizer or another dtype"
            )
        if self._last is None or asked.greedy != self._last[0].greedy:
            # else the next one is compared with this answer's first time: small steps add up
            self._last = asked, now
        return metrics


def sample_of(prompt_ids: tuple[int, ...], completion: Completion) -> Sample:
    """What a learner computes log-probs of; its versions are 0, so that two can be compared."""
    num_prompt, num_sampled = len(prompt_ids), len(completion.token_ids)
    return Sample(
        group_id=0,
        num_prompt_tokens=num_prompt,
        token_ids=prompt_ids + completion.token_ids,
        loss_mask=(False,) * num_prompt + (True,) * num_sampled,
        sampled_logprobs=(0.0,) * num_prompt + completion.logprobs,
        advantages=(0.0,) * (num_prompt + num_sampled),
        versions=(0,) * (num_prompt + num_sampled),
    )


def mean_distance(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Mean absolute difference of numbers [N][C]; 0 where there are none."""
    distances = [
        abs(a - b)
        for mine, theirs in zip(one, other, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    return sum(distances) / max(len(distances), 1)
