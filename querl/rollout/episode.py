"""One environment, one policy: play an episode to its end, whatever happens on the way."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from querl.errors import DataError
from querl.types import Action, ActionKind, FinishReason, StopReason, Trajectory, Turn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from querl.env.env import Environment, Step
    from querl.rollout.engine import Engine, RequestKey, Sampling
    from querl.rollout.history import History
    from querl.types import Message, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeLimits:
    """Three limits in tokens, under three names, and the deadlines of external calls in seconds.

    ``max_prompt`` bounds the first prompt, ``max_turn_tokens`` what one turn may generate,
    ``max_input`` what any later turn may start from. ``timeout_s`` bounds the whole episode: what
    is not over by then is cut, be it in its first turn.
    """

    max_prompt: int = 6000
    max_turn_tokens: int = 3000
    max_input: int = 29000
    timeout_s: float = 3600.0
    env_timeout_s: float = 120.0


class _Broken(Exception):
    """The rollout cannot go on, through no fault of the model; the message says why."""


async def run_episode(
    env: Environment,
    engine: Engine,
    history: History,
    *,
    task: Task,
    sampling: Sampling,
    limits: EpisodeLimits,
    key: RequestKey,
) -> Trajectory:
    """Play one task. ``limits`` sets ``sampling.max_tokens``, ``env`` its stops; turns are counted.

    A missing database, a failing disk or a missed deadline ends in ``StopReason.FAILED`` with its
    cause; EngineError and our own bugs propagate. With an engine of static batches the caller
    announces the episode by ``engine.enter`` and takes it back by ``engine.leave``.
    """
    turns: list[Turn] = []
    try:
        async with asyncio.timeout(limits.timeout_s) as deadline:
            return await _play(
                env,
                engine,
                history,
                turns,
                task=task,
                sampling=sampling,
                limits=limits,
                key=key,
            )
    except TimeoutError:
        if not deadline.expired():
            raise
        error = f"cut after {limits.timeout_s:g} s, in turn {len(turns)}"
        return _ended(task, turns, StopReason.FAILED, error)


async def _play(
    env: Environment,
    engine: Engine,
    history: History,
    turns: list[Turn],
    *,
    task: Task,
    sampling: Sampling,
    limits: EpisodeLimits,
    key: RequestKey,
) -> Trajectory:
    """Append to ``turns`` until the episode is over."""
    sampling = replace(sampling, max_tokens=limits.max_turn_tokens, stop=env.stops)
    try:
        messages = await _reset(env, task, limits)
        prompt_ids = history.start(messages)
        if len(prompt_ids) > limits.max_prompt:
            return _ended(
                task,
                turns,
                StopReason.CONTEXT_FULL,
                f"the prompt has {len(prompt_ids)} tokens, max_prompt is {limits.max_prompt}",
            )
        while True:
            turn_key = replace(key, turn=len(turns))
            turn, stop = await _play_turn(
                env, engine, history, prompt_ids, sampling=sampling, limits=limits, key=turn_key
            )
            turns.append(turn)
            if stop is not None:
                return _ended(task, turns, stop)
            prompt_ids = history.extend(messages, turns)
            if len(prompt_ids) > limits.max_input:
                return _ended(task, turns, StopReason.CONTEXT_FULL)
    except _Broken as error:
        return _ended(task, turns, StopReason.FAILED, str(error))


def _ended(task: Task, turns: list[Turn], stop: StopReason, error: str | None = None) -> Trajectory:
    return Trajectory(task_id=task.id, turns=tuple(turns), stop=stop, error=error)


async def _play_turn(
    env: Environment,
    engine: Engine,
    history: History,
    prompt_ids: tuple[int, ...],
    *,
    sampling: Sampling,
    limits: EpisodeLimits,
    key: RequestKey,
) -> tuple[Turn, StopReason | None]:
    """Sample one turn and act on it."""
    started = time.monotonic()
    try:
        completion = await engine.generate(prompt_ids, sampling, key)
    except TimeoutError as error:
        raise _Broken(f"turn {key.turn}: {error}") from error
    text = history.text(completion)
    turn = Turn(
        prompt_ids=prompt_ids,
        completion=completion,
        text=text,
        action=Action(kind=ActionKind.VOID, well_formed=False, complaint="cut at max_turn_tokens"),
    )
    was_cut = completion.finish_reason is FinishReason.LENGTH
    if was_cut and not any(stop in text for stop in sampling.stop):
        return replace(turn, seconds=time.monotonic() - started), StopReason.TRUNCATED
    step = await _step(env, text, limits)
    turn = replace(
        turn,
        action=step.action,
        observation=step.observation,
        result=step.result,
        seconds=time.monotonic() - started,
    )
    return turn, step.stop


async def _reset(env: Environment, task: Task, limits: EpisodeLimits) -> tuple[Message, ...]:
    with _environment_faults("reset", limits):
        async with asyncio.timeout(limits.env_timeout_s):
            return await env.reset(task)


async def _step(env: Environment, text: str, limits: EpisodeLimits) -> Step:
    with _environment_faults("step", limits):
        async with asyncio.timeout(limits.env_timeout_s):
            return await env.step(text)


@contextmanager
def _environment_faults(call: str, limits: EpisodeLimits) -> Iterator[None]:
    """What the world does to us is data: lost databases, failing disks, missed deadlines."""
    try:
        yield
    except TimeoutError as error:
        raise _Broken(f"{call}: no answer in {limits.env_timeout_s:g} s") from error
    except (DataError, OSError) as error:
        raise _Broken(f"{call}: {error}") from error
