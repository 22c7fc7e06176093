"""What every engine with a model must do: the same laws on a CPU and on a GPU."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from querl.errors import EngineError
from querl.rollout.dialect import Weights
from querl.rollout.engine import Engine, RequestKey, Sampling
from querl.types import Completion, FinishReason

KEY = RequestKey(seed=0, step=0, group=0, sample=0, turn=0)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An engine under test: how it is opened, and two sets of weights that it can be given.

    ``tolerance`` is the mean difference in nats between the engine and a plain forward pass of the
    models, which are float32. ``repeats`` says whether a key decides what is sampled.
    """

    open: Callable[[], Engine]
    publish: Callable[[PreTrainedModel], Weights]
    model: PreTrainedModel
    other: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int = 256
    tolerance: float = 1e-5
    repeats: bool = True

    def run(self, work: Callable[[Engine], Awaitable[Any]]) -> Any:
        """What the work gives, with an engine that has ``model`` as version 0."""

        async def go() -> Any:
            engine = self.open()
            try:
                await engine.load_weights(self.publish(self.model), version=0)
                return await work(engine)
            finally:
                await engine.close()

        return asyncio.run(go())

    def prompts(self) -> list[tuple[int, ...]]:
        texts = ("SELECT name FROM city", "city WHERE id = 1 x", "name")
        return [tuple(self.tokenizer.encode(text)) for text in texts]

    def calls(self, count: int, *, max_tokens: int = 24, **sampling: Any) -> list[Any]:
        """Calls with different keys, and prompts of different lengths."""
        prompts = self.prompts()
        return [
            (
                prompts[i % 3],
                Sampling(max_tokens=max_tokens - i % 5, **sampling),
                replace(KEY, group=i % 3, sample=i),
            )
            for i in range(count)
        ]

    def assert_sampled_by(
        self, model: PreTrainedModel, prompt: tuple[int, ...], found: Completion, **where: Any
    ) -> None:
        assert self.distance(model, prompt, found, **where) <= self.tolerance

    def distance(
        self,
        model: PreTrainedModel,
        prompt: tuple[int, ...],
        found: Completion,
        *,
        temperature: float = 1.0,
        tokens: slice = slice(None),
    ) -> float:
        """Mean difference of the log-probs from those of one plain forward pass, in nats."""
        expected = expected_logprobs(model, prompt, found, temperature)[tokens]
        pairs = zip(found.logprobs[tokens], expected, strict=True)
        return sum(abs(a - b) for a, b in pairs) / max(len(expected), 1)


def expected_logprobs(
    model: PreTrainedModel, prompt: tuple[int, ...], completion: Completion, temperature: float
) -> list[float]:
    """From one plain forward pass without padding or cache."""
    ids = torch.tensor([prompt + completion.token_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    chosen = torch.tensor(completion.token_ids)
    found = (logits / temperature).log_softmax(-1).gather(1, chosen[:, None])
    return found[:, 0].tolist()


async def ask(
    engine: Engine, calls: Sequence[tuple[tuple[int, ...], Sampling, RequestKey]]
) -> list[Completion]:
    """The completions of concurrent calls, of announced episodes."""
    engine.enter(len(calls))

    async def one(prompt: tuple[int, ...], sampling: Sampling, key: RequestKey) -> Completion:
        try:
            return await engine.generate(prompt, sampling, key)
        finally:
            engine.leave(1)

    return await asyncio.gather(*(one(*call) for call in calls))


def logprobs_are_those_of_the_learner(subject: Subject) -> None:
    for temperature in (1.0, 0.6):
        calls = subject.calls(9, temperature=temperature, max_tokens=40)
        found = subject.run(lambda engine, calls=calls: ask(engine, calls))
        for (prompt, sampling, _), completion in zip(calls, found, strict=True):
            assert 1 <= len(completion.token_ids) <= sampling.max_tokens
            assert max(completion.logprobs) <= 0
            assert set(completion.versions) == {0}
            subject.assert_sampled_by(subject.model, prompt, completion, temperature=temperature)


def greedy_takes_the_likeliest_token_whatever_the_seed(subject: Subject) -> None:
    calls = subject.calls(4, temperature=0.0)
    other = [(prompt, sampling, replace(key, seed=9)) for prompt, sampling, key in calls]

    async def twice(engine: Engine) -> list[list[Completion]]:
        return [await ask(engine, calls), await ask(engine, other)]

    first, second = subject.run(twice)
    assert [c.token_ids for c in first] == [c.token_ids for c in second]
    for (prompt, _, _), completion in zip(calls, first, strict=True):
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            logprobs = subject.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        best = logprobs.max(-1).values
        chosen = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert float((best - chosen).mean()) <= subject.tolerance


def a_key_decides_what_is_sampled(subject: Subject) -> None:
    if not subject.repeats:
        pytest.skip("this engine has no seeds of requests")
    prompt, sampling = subject.prompts()[0], Sampling(max_tokens=12)
    keys = [replace(KEY, seed=1), replace(KEY, group=1), replace(KEY, turn=1), KEY]

    async def twice(engine: Engine) -> list[Completion]:
        found = [await engine.generate(prompt, sampling, key) for key in keys]
        return [*found, await engine.generate(prompt, sampling, KEY)]

    *found, again = subject.run(twice)
    assert again.token_ids == found[-1].token_ids
    assert len({completion.token_ids for completion in found}) == len(keys)


def a_stop_string_ends_a_completion_and_is_kept(subject: Subject) -> None:
    prompt, sampling, key = subject.calls(1, temperature=0.0)[0]

    async def twice(engine: Engine) -> tuple[Completion, str, Completion]:
        whole = await engine.generate(prompt, sampling, key)
        text = subject.tokenizer.decode(list(whole.token_ids))
        assert isinstance(text, str)
        stop = re.findall("[ -~]{1,3}", text)[-1]  # bytes that are no text decode differently
        cut = await engine.generate(prompt, replace(sampling, stop=("never", stop)), key)
        return whole, stop, cut

    whole, stop, cut = subject.run(twice)
    assert cut.finish_reason is FinishReason.STOP
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert stop in subject.tokenizer.decode(list(cut.token_ids))
    assert stop not in subject.tokenizer.decode(list(cut.token_ids[:-1]))


def limit_and_context_bound_a_completion(subject: Subject) -> None:
    prompt = (subject.prompts()[0] * subject.context)[: subject.context]
    calls = [
        (prompt[:9], Sampling(max_tokens=3), KEY),
        (prompt[:-6], Sampling(max_tokens=50), replace(KEY, sample=1)),
        (prompt, Sampling(max_tokens=50), replace(KEY, sample=2)),
    ]
    found = subject.run(lambda engine: ask(engine, calls))
    assert [len(completion.token_ids) for completion in found] == [3, 6, 0]
    assert {completion.finish_reason for completion in found} == {FinishReason.LENGTH}


def new_weights_are_used_and_no_cached_prefix_survives(subject: Subject) -> None:
    prompt, sampling = subject.prompts()[0] * 8, Sampling(max_tokens=30, temperature=0.0)

    async def thrice(engine: Engine) -> list[Completion]:
        found = []
        for version, model in enumerate([subject.model, subject.other, subject.model]):
            await engine.load_weights(subject.publish(model), version=version)
            assert engine.version == version
            found.append(await engine.generate(prompt, sampling, KEY))
        return found

    old, new, back = subject.run(thrice)
    assert [set(c.versions) for c in (old, new, back)] == [{0}, {1}, {2}]
    subject.assert_sampled_by(subject.model, prompt, old)
    subject.assert_sampled_by(subject.other, prompt, new)
    subject.assert_sampled_by(subject.model, prompt, back)
    assert subject.distance(subject.model, prompt, new) > 10 * subject.tolerance


def each_token_has_the_version_that_sampled_it(subject: Subject) -> None:
    prompt, sampling = subject.prompts()[0], Sampling(max_tokens=180)

    async def publish_meanwhile(engine: Engine) -> Completion:
        asked = asyncio.create_task(engine.generate(prompt, sampling, KEY))
        await asyncio.sleep(0.2)
        await engine.load_weights(subject.publish(subject.other), version=1)
        return await asked

    found = subject.run(publish_meanwhile)
    num_old = found.versions.count(0)
    assert list(found.versions) == sorted(found.versions)
    old, new = slice(num_old), slice(num_old, None)
    subject.assert_sampled_by(subject.model, prompt, found, tokens=old)
    subject.assert_sampled_by(subject.other, prompt, found, tokens=new)


def cancelled_and_overdue_calls_leave_the_others_alone(subject: Subject) -> None:
    prompt, long = subject.prompts()[1], Sampling(max_tokens=200)

    async def three(engine: Engine) -> Completion:
        doomed = asyncio.create_task(engine.generate(prompt, long, replace(KEY, sample=1)))
        kept = asyncio.create_task(engine.generate(prompt, Sampling(max_tokens=9), KEY))
        await asyncio.sleep(0)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await engine.generate(prompt, long, replace(KEY, sample=2))
        return await kept

    found = subject.run(three)
    assert 1 <= len(found.token_ids) <= 9
    subject.assert_sampled_by(subject.model, prompt, found)


def what_is_asked_of_a_sleeping_engine_is_answered_when_it_wakes(subject: Subject) -> None:
    prompt, sampling = subject.prompts()[0], Sampling(max_tokens=12, temperature=0.0)

    async def around_an_update(engine: Engine) -> list[Completion]:
        await engine.sleep()
        await engine.wake()
        same = await engine.generate(prompt, sampling, KEY)
        await engine.sleep()
        asked = asyncio.create_task(engine.generate(prompt, sampling, KEY))
        await engine.load_weights(subject.publish(subject.other), version=1)
        await engine.wake()
        return [same, await asked]

    same, new = subject.run(around_an_update)
    subject.assert_sampled_by(subject.model, prompt, same)
    assert set(same.versions) == {0}
    if set(new.versions) == {1}:  # an engine that cannot sleep may have answered before
        subject.assert_sampled_by(subject.other, prompt, new)


def a_closed_engine_says_so(subject: Subject) -> None:
    async def nothing(engine: Engine) -> Engine:
        return engine

    engine = subject.run(nothing)
    with pytest.raises(EngineError, match="closed"):
        asyncio.run(engine.generate(subject.prompts()[0], Sampling(max_tokens=4), KEY))


LAWS = [
    logprobs_are_those_of_the_learner,
    greedy_takes_the_likeliest_token_whatever_the_seed,
    a_key_decides_what_is_sampled,
    a_stop_string_ends_a_completion_and_is_kept,
    limit_and_context_bound_a_completion,
    new_weights_are_used_and_no_cached_prefix_survives,
    each_token_has_the_version_that_sampled_it,
    cancelled_and_overdue_calls_leave_the_others_alone,
    what_is_asked_of_a_sleeping_engine_is_answered_when_it_wakes,
    a_closed_engine_says_so,
]
