"""Episodes that a server plays: few at a time, each to its end, and only then its clock runs."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from company import company_recipe, make_company, tasks
from tiny_policy import tiny_tokenizer

from querl.env.rewards import find_reward
from querl.launch.engines import episode_places, player_of
from querl.launch.local import load_speaker, validate
from querl.rollout.engine import RequestKey, Sampling
from querl.rollout.sampler import Player, RewardedGroups
from querl.rollout.scripted import ScriptedEngine
from querl.rollout.stream import GroupStream, TaskOrder
from querl.types import Completion, StopReason, Task

SEATS = 4
PLACES = 5
SERVED = ("engine.kind=vllm", "engine.placement=colocated", f"engine.max_batch={SEATS}")


class Seated(ScriptedEngine):
    """Looks in its first turn and answers in its second; so many are sampled at once."""

    def __init__(self) -> None:
        super().__init__(tiny_tokenizer(), lambda key, _: TURNS[key.turn])
        self.seats = asyncio.Semaphore(SEATS)
        self.may_ask = asyncio.Event()
        self.may_ask.set()
        self.asked: list[RequestKey] = []

    async def generate(
        self, prompt_ids: tuple[int, ...], sampling: Sampling, key: RequestKey
    ) -> Completion:
        async with self.seats:
            self.asked.append(key)
            await self.may_ask.wait()
            return await super().generate(prompt_ids, sampling, key)


TURNS = ("<think>a</think><sql>SELECT 1</sql>", "<think>b</think><solution>SELECT 1</solution>")


@pytest.fixture
def company(tmp_path: Path) -> Path:
    return make_company(tmp_path / "company")


def opened(company: Path, engine: Seated, *more: str) -> AbstractAsyncContextManager[Player]:
    recipe = company_recipe(company, *SERVED, "env.max_turn_tokens=200", *more)
    speaker = load_speaker(recipe)
    return player_of(recipe, engine, speaker.history, speaker.tokenizer)


def many(company: Path, count: int) -> list[Task]:
    asked = tasks(company / "company.sqlite")[0]
    return [replace(asked, id=f"t{i}") for i in range(count)]


def test_no_deadline_runs_while_an_episode_waits_for_the_others(company: Path) -> None:
    async def go() -> set[StopReason]:
        engine = Seated()
        engine.may_ask.clear()
        async with opened(company, engine, "env.timeout_s=2") as player:
            playing = asyncio.create_task(
                validate(player, many(company, 3 * PLACES), seed=0, step=0)
            )
            async with asyncio.timeout(60):
                while len(engine.asked) <= SEATS:  # until the first are cut
                    await asyncio.sleep(0.01)
            engine.may_ask.set()
            episodes = await playing
        stops = [episode.trajectory.stop for episode in episodes]
        assert StopReason.FAILED in stops[:PLACES]
        return set(stops[PLACES:])

    assert asyncio.run(go()) == {StopReason.ANSWERED}


def test_an_episode_keeps_its_place_over_its_turns(company: Path) -> None:
    async def go() -> list[RequestKey]:
        engine = Seated()
        async with opened(company, engine) as player:
            await validate(player, many(company, 8 * PLACES), seed=0, step=0)
        return engine.asked

    asked = asyncio.run(go())
    groups = list(dict.fromkeys(key.group for key in asked))
    assert len(asked) == 2 * len(groups) == 16 * PLACES
    for number, group in enumerate(groups):
        ended = max(i for i, key in enumerate(asked) if key.group == group)
        begun = {key.group for key in asked[:ended]}
        assert len(begun) <= number + 1 + 2 * PLACES, "the prefix of its first turn may be gone"


def test_training_over_an_update_and_a_validation_beside_it_wait_for_nobody_for_ever(
    company: Path,
) -> None:
    async def go() -> list[int]:
        engine = Seated()
        async with opened(company, engine) as player:
            sampler = RewardedGroups(
                player=player, reward_at=lambda _: find_reward("binary"), group_size=3, seed=0
            )
            order = TaskOrder(many(company, 9), 0)
            async with GroupStream(
                order, sampler, engine, keep=lambda _: True, groups_per_step=4, max_lag=1
            ) as stream:
                steps = []
                for step in range(3):
                    steps.append(len(await stream.next_step()))
                    engine.may_ask.clear()  # the engine sleeps, whoever is in mid-episode
                    await asyncio.sleep(0.05)
                    await engine.load_weights(None, step + 1)  # type: ignore[arg-type]
                    engine.may_ask.set()
                    stream.release_step()
                    scored = await validate(player.greedy(), many(company, 7), seed=0, step=step)
                    steps.append(len(scored))
                return steps

    async def in_time() -> list[int]:
        async with asyncio.timeout(60):
            return await go()

    assert asyncio.run(in_time()) == [4, 7] * 3


def test_an_engine_of_static_batches_meets_all_its_episodes_at_once(company: Path) -> None:
    served, static = company_recipe(company, *SERVED), company_recipe(company)
    assert isinstance(episode_places(served), asyncio.Semaphore)
    assert isinstance(episode_places(static), nullcontext)
