"""The question after each publish finds weights that did not arrive, and lets healthy ones pass."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_policy import make_samples, tiny_policy, tiny_tokenizer

from querl.algorithm.loss import ClipLoss
from querl.errors import EngineError
from querl.launch.placement import SideBySide, TakingTurns
from querl.metrics import Metrics
from querl.rollout.hf import HfEngine
from querl.rollout.probe import Probe
from querl.trainer.full import FullLearner, UpdateSettings
from querl.trainer.optim import AdamWSettings

PROMPT = tuple(tiny_tokenizer().encode("SELECT name FROM city WHERE"))
SAMPLES = make_samples(4, 4)


def learner(*, temperature: float = 1.0, lr: float = 1e-2) -> FullLearner:
    return FullLearner(
        tiny_policy(),
        tiny_tokenizer(),
        loss=ClipLoss(),
        optimizer=AdamWSettings(lr=lr),
        update=UpdateSettings(temperature=temperature),
    )


class Deaf(HfEngine):
    """Says that it has new weights, and has the old ones."""

    async def load_weights(self, weights: object, version: int) -> None:
        self._version = version


class Moody(Deaf):
    """As a server on a GPU: chance follows no seed, numbers hang on who is computed beside."""

    num_asked = num_open = 0

    async def generate(self, prompt_ids, sampling, key):
        self.num_asked += 1
        self.num_open += 1
        num_asked = self.num_asked
        await asyncio.sleep(0)
        num_beside = self.num_open - 1
        if sampling.temperature:
            key = replace(key, step=num_asked)
        completion = await super().generate(prompt_ids, sampling, key)
        self.num_open -= 1
        rounding = 1e-6 * num_beside * num_asked
        logprobs = tuple(logprob - rounding for logprob in completion.logprobs)
        return replace(completion, logprobs=logprobs)


def probe(engine: HfEngine, policy: FullLearner, *, temperature: float = 1.0) -> Probe:
    return Probe(engine, policy.logprobs, PROMPT, temperature=temperature, tolerance=0.25)


def publishing(engine: HfEngine, policy: FullLearner, placement: Any, *, updates: int) -> Metrics:
    """What the placement tells of publishing now and after each update."""

    async def go() -> Metrics:
        metrics = Metrics()
        metrics.add(await placement.publish(0))
        for version in range(1, updates + 1):
            metrics.add(await placement.make_room())
            await policy.update(SAMPLES)
            metrics.add(await placement.publish(version))
        metrics.add(await placement.make_room())
        await engine.close()
        return metrics

    return asyncio.run(go())


@pytest.mark.parametrize("kind", [SideBySide, TakingTurns])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_engine_that_loads_what_it_is_given_agrees_after_each_publish(
    kind: type[SideBySide], temperature: float
) -> None:
    policy = learner(temperature=temperature)
    engine = HfEngine(tiny_policy(), tiny_tokenizer())
    question = probe(engine, policy, temperature=temperature)
    values = publishing(engine, policy, kind(engine, policy, question), updates=2).values()
    assert values["probe/abs_dlogprob"] < 1e-5
    assert values["probe/moved"] > 1e-3


@pytest.mark.parametrize("kind", [SideBySide, TakingTurns])
@pytest.mark.parametrize("deaf", [Deaf, Moody])
def test_weights_that_do_not_arrive_end_the_run(
    kind: type[SideBySide], deaf: type[HfEngine]
) -> None:
    policy = learner()
    engine = deaf(tiny_policy(), tiny_tokenizer())
    with pytest.raises(EngineError, match="did not reach it"):
        publishing(engine, policy, kind(engine, policy, probe(engine, policy)), updates=1)


@pytest.mark.parametrize("kind", [SideBySide, TakingTurns])
def test_weights_that_do_not_arrive_are_found_though_each_step_is_too_small_to_see(
    kind: type[SideBySide],
) -> None:
    def run(*, updates: int) -> Metrics:
        policy, engine = learner(lr=2e-5), Deaf(tiny_policy(), tiny_tokenizer())
        placement = kind(engine, policy, probe(engine, policy))
        return publishing(engine, policy, placement, updates=updates)

    assert 0 < run(updates=1).values()["probe/moved"] < 1e-3
    with pytest.raises(EngineError, match="did not reach it"):
        run(updates=40)


def test_an_engine_with_other_weights_is_found_at_once() -> None:
    policy = learner()
    other = tiny_policy()
    with torch.no_grad():
        for weight in other.parameters():
            weight.normal_(std=0.5)
    engine = Deaf(other, tiny_tokenizer())
    with pytest.raises(EngineError, match="nats a token apart"):
        publishing(engine, policy, SideBySide(engine, policy, probe(engine, policy)), updates=0)


def test_a_learner_whose_log_probs_are_no_numbers_agrees_with_no_engine() -> None:
    policy = learner()
    engine = HfEngine(tiny_policy(), tiny_tokenizer())

    async def broken(samples):
        return [[math.nan for _ in logprobs] for logprobs in await policy.logprobs(samples)]

    question = Probe(engine, broken, PROMPT, temperature=1.0, tolerance=0.25)
    with pytest.raises(EngineError, match="nan nats a token apart"):
        publishing(engine, policy, SideBySide(engine, policy, question), updates=0)


def test_what_the_learner_rounds_by_the_company_a_sample_is_in_is_no_movement() -> None:
    """In bf16 a sample's log-probs hang on the row that it is in, and the engine's stay."""
    policy = learner()
    engine = HfEngine(tiny_policy(), tiny_tokenizer())

    async def rounded(samples):
        found = await policy.logprobs(samples)
        return [[x + 0.006 * len(samples) for x in logprobs] for logprobs in found]

    async def go() -> Metrics:
        question = Probe(engine, rounded, PROMPT, temperature=1.0, tolerance=0.25)
        placement = SideBySide(engine, policy, question)
        metrics = Metrics()
        for version in range(3):
            metrics.add(await placement.publish(version))
        await engine.close()
        return metrics

    assert asyncio.run(go()).values()["probe/moved"] == 0


def test_weights_that_stay_may_give_the_same_answer() -> None:
    policy = learner()
    engine = Deaf(tiny_policy(), tiny_tokenizer())

    async def go() -> Metrics:
        placement = SideBySide(engine, policy, probe(engine, policy))
        await placement.publish(0)
        metrics = await placement.publish(1)
        await engine.close()
        return metrics

    assert asyncio.run(go()).values()["probe/moved"] == 0
