"""A stored step, trained on again in memory: what its numbers came from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from querl import records
from querl.algorithm.credit import has_advantage
from querl.algorithm.sample import LeftOut, to_samples
from querl.config import load_recipe
from querl.errors import CheckpointError
from querl.launch.local import load_policy, make_learner, make_recipe_credit
from querl.launch.memory import with_rows
from querl.launch.training import left_out_by
from querl.metrics import JsonlSink, Metrics
from querl.train import describe
from querl.trainer.checkpoint import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from querl.algorithm.credit import TurnCredit
    from querl.config import Recipe
    from querl.trainer.full import FullLearner
    from querl.trainer.guards import Fault
    from querl.types import Group, Judgement, Sample, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one trajectory had in its step: means over its trained tokens, before and after it.

    ``loss`` and ``grad_norm`` are those of the trajectory alone, at the first pass, divided as the
    step was; ``abs_dlogprob`` is between sampler and learner, in nats; ``ratio`` is after / before
    the update, and ``clip_fraction`` the share that the loss would hold back there.
    """

    loss: float
    grad_norm: float
    abs_dlogprob: float
    ratio: float
    clip_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One trajectory of the step. ``advantage`` is the mean over its turns' tokens."""

    trajectory: Trajectory
    judgement: Judgement
    reward: float
    reward_parts: dict[str, float]
    advantage: float
    left_out: LeftOut | None
    samples: tuple[Sample, ...]
    share: Share | None  # None where nothing of it was trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A step again. ``recorded`` are the run's own numbers, empty where they are gone.

    ``faults`` are the optimizer steps that were not made this time.
    """

    step: int
    weights_step: int  # how many updates the weights had behind them
    groups: list[Group]
    parts_PG: list[list[Part]]
    left_out: Counter[LeftOut]
    faults: tuple[Fault, ...]
    numbers: dict[str, float]
    recorded: dict[str, float]

    @property
    def has_its_weights(self) -> bool:
        """Whether the weights are those that the step was trained from."""
        return self.weights_step == self.step - 1

    def compared(self) -> list[tuple[str, float, float]]:
        """(name, recorded, replayed) for all numbers but of time, as digits are recorded."""
        return [
            (name, self.recorded[name], round(value, JsonlSink.DIGITS))
            for name, value in self.numbers.items()
            if self.recorded.get(name) is not None and not name.startswith(("time/", "speed/"))
        ]


async def replay(run: Path, step: int, overrides: tuple[str, ...] = ()) -> Replay:
    """Train on a step of a run's folder again. Writes nothing.

    ``overrides`` change the run's recipe: what would another loss have made of this batch? Raises
    CheckpointError for what is no run, or has no such step, ConfigError for what cannot train.
    """
    if not (run / "recipe.toml").exists():
        raise CheckpointError(f"{run} holds no run: name the folder that --out named")
    recipe = load_recipe(run / "recipe.toml", overrides)
    recipe.check_training()
    if load_recipe(run / "recipe.toml").algorithm.kl.target is None:
        recipe = _without_target(recipe)
    groups = records.read_groups(run / "records", step)
    policy = load_policy(recipe)
    learner = make_learner(with_rows(recipe), policy)
    with learner:
        _load_nearest(learner, run / "checkpoints", step - 1)
        weights_step = learner.step
        advantages_PGt = make_recipe_credit(recipe)(groups)
        leave_out = left_out_by(recipe)
        samples, left_out = to_samples(groups, advantages_PGt, leave_out=leave_out)
        parts_PG = [
            _parts(group, advantages_Gt, leave_out)
            for group, advantages_Gt in zip(groups, advantages_PGt, strict=True)
        ]
        numbers, parts_PG = await _train(learner, samples, parts_PG)
    numbers.add(describe(groups, advantages_PGt, left_out, version=step - 1))
    lines = [line for line in JsonlSink(run / "metrics.jsonl").read() if line["step"] == step]
    return Replay(
        step=step,
        weights_step=weights_step,
        groups=groups,
        parts_PG=parts_PG,
        left_out=left_out,
        faults=tuple(learner.faults),
        numbers=numbers.values(),
        recorded=lines[-1] if lines else {},
    )


def _without_target(recipe: Recipe) -> Recipe:
    """With the recipe's own KL coefficient: a checkpoint has none that followed a target.

    A target moves nothing in the step after which it acts.
    """
    algorithm = recipe.algorithm
    kl = algorithm.kl.model_copy(update={"target": None})
    return recipe.model_copy(update={"algorithm": algorithm.model_copy(update={"kl": kl})})


def _load_nearest(learner: FullLearner, folder: Path, step: int) -> None:
    """The latest state at or before ``step`` updates; without one the model as it began."""
    kept = {int(path.name.removeprefix("step-")): path for path in folder.glob("step-*")}
    found = max((number for number in kept if number <= step), default=None)
    if found is None:
        return
    torch.set_num_threads(read_json(kept[found] / "state.json")["num_threads"])
    learner.load(kept[found])


def _parts(
    group: Group, advantages_Gt: Sequence[Sequence[TurnCredit]], leave_out: frozenset[LeftOut]
) -> list[Part]:
    """A group's trajectories, each with its samples or with why it has none."""
    is_silent = LeftOut.NO_SIGNAL in leave_out and not has_advantage(advantages_Gt)
    parts = []
    for number, (trajectory, advantages_t) in enumerate(
        zip(group.trajectories, advantages_Gt, strict=True)
    ):
        alone = replace(
            group,
            trajectories=(trajectory,),
            judgements=(group.judgements[number],),
            rewards=(group.rewards[number],),
        )
        samples, reasons = to_samples(
            [alone], [[advantages_t]], leave_out=leave_out - {LeftOut.NO_SIGNAL}
        )
        if samples and is_silent:
            samples, reasons = [], Counter([LeftOut.NO_SIGNAL])
        parts.append(
            Part(
                trajectory=trajectory,
                judgement=group.judgements[number],
                reward=group.rewards[number],
                reward_parts={name: part_G[number] for name, part_G in group.reward_parts.items()},
                advantage=_mean_advantage(trajectory, advantages_t),
                left_out=next(iter(reasons), None),
                samples=tuple(samples),
                share=None,
            )
        )
    return parts


def _mean_advantage(trajectory: Trajectory, advantages_t: Sequence[TurnCredit]) -> float:
    """Over all its sampled tokens; 0 where there are none."""
    values: list[float] = []
    for turn, credit in zip(trajectory.turns, advantages_t, strict=True):
        num_tokens = len(turn.completion.token_ids)
        values += [credit] * num_tokens if isinstance(credit, float | int) else credit
    return fmean(values) if values else 0.0


async def _train(
    learner: FullLearner, samples: Sequence[Sample], parts_PG: list[list[Part]]
) -> tuple[Metrics, list[list[Part]]]:
    """The update's numbers, and the parts with what each had in it."""
    sets = [part.samples for parts_G in parts_PG for part in parts_G if part.samples]
    old = [await learner.logprobs(one) for one in sets]
    before = await learner.explain(sets, old)
    numbers = await learner.update(samples)
    after = await learner.explain(sets, old)
    shares = iter([_share(*two) for two in zip(before, after, strict=True)])
    return numbers, [
        [replace(part, share=next(shares)) if part.samples else part for part in parts_G]
        for parts_G in parts_PG
    ]


def _share(before: Metrics, after: Metrics) -> Share:
    # no token has an advantage: nothing can be held back
    clip_fraction = after.values().get("policy/clip_fraction", 0.0)
    return Share(
        loss=before["policy/loss"],
        grad_norm=before["optimizer/grad_norm"],
        abs_dlogprob=before["sampler/abs_dlogprob"],
        ratio=after["policy/ratio"],
        clip_fraction=clip_fraction,
    )
