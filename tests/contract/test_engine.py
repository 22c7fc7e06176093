"""What every rollout engine must do; parametrised over the engines that run in this process."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from tiny_policy import tiny_tokenizer
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from querl.errors import EngineError
from querl.rollout.engine import Engine, RequestKey, Sampling
from querl.rollout.hf import HfEngine
from querl.rollout.scripted import ScriptedEngine, scripted_logprob
from querl.trainer.weights import PublishedWeights
from querl.types import Completion, FinishReason

TOKENIZER = tiny_tokenizer()
SIZE = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
PROMPTS = [tuple(TOKENIZER.encode(text)) for text in ("SELECT name", "city WHERE id = 1 x", "n")]
KEY = RequestKey(seed=0, step=0, group=0, sample=0, turn=0)


def decoder(family: str, seed: int = 0) -> PreTrainedModel:
    """A random decoder; the Gemma one sees only a window of 16 tokens in two of its layers."""
    torch.manual_seed(seed)
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        config = Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=16, layer_types=kinds)
        return Gemma3ForCausalLM(config).eval()
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZE)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**SIZE)).eval()


def hf_engine(**settings: Any) -> HfEngine:
    return HfEngine(decoder("qwen2"), TOKENIZER, **settings)


def scripted_engine() -> ScriptedEngine:
    def answer(key: RequestKey, prompt: str) -> str:
        return f"{prompt[:4]} {key.seed} {key.group} {key.sample} {key.turn} = 'x' > y" * 3

    return ScriptedEngine(TOKENIZER, answer)


ENGINES: dict[str, Callable[[], Engine]] = {"hf": hf_engine, "scripted": scripted_engine}


@pytest.fixture(params=ENGINES)
def make_engine(request: pytest.FixtureRequest) -> Callable[[], Engine]:
    return ENGINES[request.param]


def ask(engine: Engine, calls: Sequence[tuple[tuple[int, ...], Sampling, RequestKey]]) -> Any:
    """All completions of concurrent calls, of announced episodes; the engine is closed after."""

    async def go() -> list[Completion]:
        engine.enter(len(calls))

        async def one(prompt: tuple[int, ...], sampling: Sampling, key: RequestKey) -> Completion:
            try:
                return await engine.generate(prompt, sampling, key)
            finally:
                engine.leave(1)

        return await asyncio.gather(*(one(*call) for call in calls))

    return closing(engine, go())


def closing(engine: Engine, work: Coroutine[Any, Any, Any]) -> Any:
    async def go() -> Any:
        try:
            return await work
        finally:
            await engine.close()

    return asyncio.run(go())


def samples(n: int, *, max_tokens: int = 24, **sampling: Any) -> list[Any]:
    """``n`` calls with different keys and prompts of different lengths."""
    return [
        (
            PROMPTS[i % 3],
            Sampling(max_tokens=max_tokens - i % 5, **sampling),
            replace(KEY, group=i % 3, sample=i),
        )
        for i in range(n)
    ]


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


# --- every engine


def test_every_token_has_a_logprob_and_a_version(make_engine: Callable[[], Engine]) -> None:
    for completion in ask(make_engine(), samples(5)):
        assert 1 <= len(completion.token_ids) <= 24
        assert len(completion.logprobs) == len(completion.token_ids)
        assert all(logprob <= 0 for logprob in completion.logprobs)
        assert set(completion.versions) == {0}


def test_the_same_calls_give_the_same_completions_bit_for_bit(
    make_engine: Callable[[], Engine],
) -> None:
    assert ask(make_engine(), samples(7)) == ask(make_engine(), samples(7))


def test_a_key_decides_what_is_sampled(make_engine: Callable[[], Engine]) -> None:
    sampling = Sampling(max_tokens=12)
    keys = [replace(KEY, seed=1), replace(KEY, group=1), replace(KEY, sample=1), KEY]
    found = ask(make_engine(), [(PROMPTS[0], sampling, key) for key in keys])
    assert len({completion.token_ids for completion in found}) == len(keys)


def test_a_stop_string_ends_a_completion_and_is_kept(make_engine: Callable[[], Engine]) -> None:
    whole = ask(make_engine(), samples(1))[0]
    text = TOKENIZER.decode(list(whole.token_ids))
    assert isinstance(text, str)
    stop = text[4:7]
    prompt, sampling, key = samples(1)[0]
    cut = ask(make_engine(), [(prompt, replace(sampling, stop=("never", stop)), key)])[0]
    assert cut.finish_reason is FinishReason.STOP
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert stop in TOKENIZER.decode(list(cut.token_ids))
    assert stop not in TOKENIZER.decode(list(cut.token_ids[:-1]))


def test_too_many_tokens_are_cut(make_engine: Callable[[], Engine]) -> None:
    found = ask(make_engine(), [(PROMPTS[0], Sampling(max_tokens=3), KEY)])[0]
    assert found.finish_reason is FinishReason.LENGTH
    assert len(found.token_ids) == 3


def test_loading_weights_sets_the_version_of_later_tokens(
    make_engine: Callable[[], Engine],
) -> None:
    engine = make_engine()

    async def go() -> Completion:
        await engine.sleep()
        await engine.wake()
        await engine.load_weights(PublishedWeights(decoder("qwen2", seed=3)), version=5)
        return await engine.generate(PROMPTS[0], Sampling(max_tokens=4), KEY)

    completion = closing(engine, go())
    assert engine.version == 5
    assert completion.versions == (5,) * 4


def test_a_closed_engine_says_so(make_engine: Callable[[], Engine]) -> None:
    engine = make_engine()
    closing(engine, asyncio.sleep(0))
    with pytest.raises(EngineError, match="closed"):
        asyncio.run(engine.generate(PROMPTS[0], Sampling(max_tokens=4), KEY))


def test_a_cancelled_call_leaves_the_others_alone(make_engine: Callable[[], Engine]) -> None:
    engine = make_engine()

    async def go() -> Completion:
        long = Sampling(max_tokens=200)
        doomed = asyncio.ensure_future(engine.generate(PROMPTS[1], long, replace(KEY, sample=1)))
        kept = asyncio.ensure_future(engine.generate(PROMPTS[0], Sampling(max_tokens=9), KEY))
        await asyncio.sleep(0)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        return await kept

    assert len(closing(engine, go()).token_ids) == 9


def test_scripted_logprobs_are_a_function_of_the_token() -> None:
    found = ask(scripted_engine(), samples(1))[0]
    assert found.logprobs == tuple(map(scripted_logprob, found.token_ids))


# --- engines with a model


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_plain_forward_pass(family: str, temperature: float) -> None:
    model = decoder(family)
    calls = samples(9, temperature=temperature, max_tokens=40)
    found = ask(HfEngine(model, TOKENIZER, max_batch=5, prefill_tokens=32), calls)
    for (prompt, _, _), completion in zip(calls, found, strict=True):
        expected = expected_logprobs(model, prompt, completion, temperature)
        assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def test_greedy_takes_the_likeliest_token_whatever_the_seed() -> None:
    model = decoder("qwen2")
    calls = samples(4, temperature=0.0)
    other = [(prompt, sampling, replace(key, seed=9)) for prompt, sampling, key in calls]
    found = ask(HfEngine(model, TOKENIZER), calls)
    again = ask(HfEngine(model, TOKENIZER), other)
    assert [c.token_ids for c in found] == [c.token_ids for c in again]
    for (prompt, _, _), completion in zip(calls, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion.token_ids])).logits
        assert completion.token_ids == tuple(logits[0, len(prompt) - 1 : -1].argmax(-1).tolist())


def test_the_tail_beyond_top_p_is_never_sampled_and_the_rest_renormalised() -> None:
    model = decoder("qwen2")
    calls = [*samples(6, top_p=0.5, max_tokens=20), *samples(2, max_tokens=20)]
    calls = [(p, s, replace(k, turn=i)) for i, (p, s, k) in enumerate(calls)]
    found = ask(HfEngine(model, TOKENIZER), calls)
    for (prompt, _, _), completion in zip(calls[:6], found[:6], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion.token_ids])).logits
        for row, token, logprob in zip(
            logits[0, len(prompt) - 1 : -1], completion.token_ids, completion.logprobs, strict=True
        ):
            probs = row.softmax(-1)
            above = probs[probs > probs[token]].sum()
            assert above < 0.5
            nucleus = probs[probs >= probs[token]].sum()
            assert logprob <= float((probs[token] / max(nucleus, 0.5)).log()) + 1e-4
    expected = expected_logprobs(model, calls[6][0], found[6], 1.0)
    assert found[6].logprobs == pytest.approx(expected, abs=1e-5)


def test_sampled_frequencies_are_the_probabilities() -> None:
    model = decoder("llama")
    calls = [
        (PROMPTS[0], Sampling(max_tokens=1), replace(KEY, group=i // 64, sample=i % 64))
        for i in range(2048)
    ]
    found = ask(HfEngine(model, TOKENIZER, max_batch=2048), calls)
    counts = torch.zeros(len(TOKENIZER))
    for completion in found:
        counts[completion.token_ids[0]] += 1
    with torch.no_grad():
        probs = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    assert 0.5 * float((counts / 2048 - probs).abs().sum()) < 0.13  # 0.09 is expected by chance


def test_an_end_token_ends_a_completion_and_is_kept() -> None:
    end_ids = frozenset(range(40, 140))
    found = ask(hf_engine(end_ids=end_ids), samples(8))
    ended = [c for c in found if c.finish_reason is FinishReason.END]
    assert ended
    for completion in ended:
        assert completion.token_ids[-1] in end_ids
        assert end_ids.isdisjoint(completion.token_ids[:-1])


def test_the_context_bounds_a_completion() -> None:
    prompt = PROMPTS[0] * 100
    calls = [
        (prompt[:250], Sampling(max_tokens=50), KEY),
        (prompt[:256], Sampling(max_tokens=50), replace(KEY, sample=1)),
    ]
    nearly_full, full = ask(hf_engine(), calls)
    assert len(nearly_full.token_ids) == 6
    assert full.token_ids == ()
    assert {nearly_full.finish_reason, full.finish_reason} == {FinishReason.LENGTH}


def test_new_weights_are_used_and_nothing_computed_with_the_old_ones() -> None:
    model, other = decoder("qwen2"), decoder("qwen2", seed=1)
    engine = HfEngine(model, TOKENIZER)

    async def go() -> tuple[Completion, tuple[int, ...], Completion]:
        engine.enter(1)
        sampling = Sampling(max_tokens=30, stop=("e", "1", " "))
        first = await engine.generate(PROMPTS[0], sampling, KEY)
        assert first.finish_reason is FinishReason.STOP  # so that its prefix is kept
        await engine.load_weights(PublishedWeights(other), version=1)
        prompt = PROMPTS[0] + first.token_ids + PROMPTS[1]
        second = await engine.generate(prompt, Sampling(max_tokens=20), replace(KEY, turn=1))
        engine.leave(1)
        return first, prompt, second

    _, prompt, second = closing(engine, go())
    assert second.logprobs == pytest.approx(expected_logprobs(other, prompt, second, 1.0), abs=1e-5)


@pytest.mark.parametrize("reuse_bytes", [0, 2**20])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_later_turns_are_exact_with_and_without_what_earlier_ones_computed(
    family: str, reuse_bytes: int
) -> None:
    model = decoder(family)
    engine = HfEngine(model, TOKENIZER, reuse_bytes=reuse_bytes, max_batch=8)
    fed: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: fed.append(inputs[0].numel())
    )

    async def episode(sample: int) -> list[tuple[tuple[int, ...], Completion]]:
        prompt, turns = PROMPTS[sample % 2] * 8, []
        for turn in range(3):
            key = replace(KEY, group=sample % 2, sample=sample, turn=turn)
            sampling = Sampling(max_tokens=60 + sample, stop=tuple("aeinost1 "))
            completion = await engine.generate(prompt, sampling, key)
            turns.append((prompt, completion))
            prompt += completion.token_ids + PROMPTS[2] * (1 + sample)
        engine.leave(1)
        return turns

    async def go() -> list[list[tuple[tuple[int, ...], Completion]]]:
        engine.enter(6)
        return await asyncio.gather(*(episode(sample) for sample in range(6)))

    episodes = closing(engine, go())
    later = fed[3:]  # the probe for the cache's shape, and the prompts of the two groups
    assert (max(later) <= 6 * 7) is (reuse_bytes > 0), later
    for prompt, completion in chain.from_iterable(episodes):
        expected = expected_logprobs(model, prompt, completion, 1.0)
        assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def test_what_is_kept_of_an_episode_that_has_left_makes_room_for_those_that_live() -> None:
    model = decoder("qwen2")
    prompt = PROMPTS[0] * 12
    bytes_a_token = 3 * 2 * SIZE["num_key_value_heads"] * 8 * 4  # layers, keys and values, float32
    engine = HfEngine(model, TOKENIZER, reuse_bytes=bytes_a_token * (len(prompt) + 8))
    fed: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: fed.append(inputs[0].numel())
    )

    async def episode(sample: int, num_turns: int) -> None:
        ids = prompt
        for turn in range(num_turns):
            key = replace(KEY, sample=sample, turn=turn)
            # the first to end is kept first, and then nothing else fits
            ids += (await engine.generate(ids, Sampling(max_tokens=1 + sample), key)).token_ids
        engine.leave(1)

    async def go() -> None:
        engine.enter(2)
        await asyncio.gather(episode(0, num_turns=1), episode(1, num_turns=3))

    closing(engine, go())
    prefills = [num_tokens for num_tokens in fed if num_tokens > 2]
    assert len(prefills) == 2, "the shared prompt, and the second turn that nothing was kept for"


def test_a_prompt_that_a_group_shares_is_computed_once() -> None:
    model = decoder("qwen2")
    fed: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: fed.append(inputs[0].numel())
    )
    calls = [(PROMPTS[0] * 10, Sampling(max_tokens=1), replace(KEY, sample=i)) for i in range(8)]
    ask(HfEngine(model, TOKENIZER), calls)
    assert max(fed) == len(PROMPTS[0]) * 10


def test_a_batch_waits_for_every_live_episode() -> None:
    engine = hf_engine()

    async def go() -> tuple[bool, int]:
        engine.enter(3)
        sampling = Sampling(max_tokens=2)
        first = asyncio.ensure_future(engine.generate(PROMPTS[0], sampling, KEY))
        second = asyncio.ensure_future(
            engine.generate(PROMPTS[1], sampling, replace(KEY, sample=1))
        )
        for _ in range(20):
            await asyncio.sleep(0)
        waited = not first.done()
        engine.leave(1)
        found = await asyncio.gather(first, second)
        engine.leave(2)
        return waited, len(found)

    assert closing(engine, go()) == (True, 2)


def test_a_row_is_answered_while_its_neighbours_still_decode() -> None:
    engine = hf_engine()

    async def go() -> bool:
        long = asyncio.ensure_future(
            engine.generate(PROMPTS[0], Sampling(max_tokens=240), replace(KEY, sample=1))
        )
        await engine.generate(PROMPTS[0], Sampling(max_tokens=1), KEY)
        was_running = not long.done()
        await long
        return was_running

    assert closing(engine, go())


def test_closing_ends_a_running_batch() -> None:
    engine = hf_engine()

    async def go() -> BaseException | Completion:
        running = asyncio.ensure_future(engine.generate(PROMPTS[0], Sampling(max_tokens=240), KEY))
        await asyncio.sleep(0.01)
        await engine.close()
        (outcome,) = await asyncio.gather(running, return_exceptions=True)
        return outcome

    assert isinstance(asyncio.run(go()), EngineError)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = decoder("qwen2")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(EngineError, match="not numbers"):
        ask(HfEngine(model, TOKENIZER), samples(2))


def test_the_model_is_left_as_it_was_found() -> None:
    model = decoder("qwen2").train()
    before = copy.deepcopy(model.state_dict())
    ask(HfEngine(model, TOKENIZER), samples(2))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())
