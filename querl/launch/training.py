"""A whole training run in one process: what it needs is made ready, then it trains."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from querl.algorithm.credit import has_signal
from querl.algorithm.loss import ONLY_ADVANTAGES
from querl.algorithm.sample import LeftOut
from querl.data.audit import Fault
from querl.env.rewards import find_reward
from querl.eval.run import summarise
from querl.launch.engines import make_engine, open_player
from querl.launch.local import (
    check_suite,
    load_policy,
    make_env,
    make_learner,
    make_recipe_credit,
    make_reward,
    make_turn_rewards,
    open_databases,
    validate,
)
from querl.launch.memory import MeasuredUpdates, plan_memory, with_rows
from querl.launch.needs import beyond_positions
from querl.launch.placement import SideBySide, TakingTurns
from querl.launch.tasks import check_own_golds, choose_tasks, drop_faulty_golds, drop_long_prompts
from querl.loggers import check_loggers
from querl.rollout.probe import Probe
from querl.rollout.sampler import RewardedGroups
from querl.rollout.stream import GroupStream, TaskOrder
from querl.run import fingerprint, is_finished
from querl.train import Teaching, train

if TYPE_CHECKING:
    from querl.algorithm.credit import Credit
    from querl.config import Recipe
    from querl.env.rewards import Reward
    from querl.env.turn_rewards import TurnRewards
    from querl.launch.local import Policy
    from querl.launch.memory import Memory
    from querl.rollout.engine import Engine
    from querl.rollout.sampler import Player
    from querl.run import Run
    from querl.train import Evaluate, Placement
    from querl.trainer.full import FullLearner
    from querl.types import Task

HowFar = Callable[[float, float, str], None]  # done, in all, of what


def _unheard(done: float, total: float, what: str) -> None:
    """Nobody watches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a run needs, checked before its folder is touched."""

    policy: Policy
    learner: FullLearner
    memory: Memory | None  # None where the model's shape is unknown
    reward_at: Callable[[int], Reward]
    turn_rewards: TurnRewards | None
    credit: Credit
    training: list[Task]
    validation: list[Task]
    left_out: str  # how many tasks were, and why, for the eye
    num_unseen: int  # of the validation tasks: their prompts are too long, so they count as wrong


async def prepare(recipe: Recipe, on_done: HowFar = _unheard) -> Prepared:
    """Load model and tasks, and leave out tasks that cannot teach. Writes nothing.

    Raises ConfigError, DataError or ModelError for whatever the recipe names that is not usable.
    """
    recipe.check_training()
    check_loggers(recipe.run.loggers)
    reward_at = make_reward(recipe)
    turn_rewards = make_turn_rewards(recipe)
    credit = make_recipe_credit(recipe)
    training, validation = choose_tasks(recipe)
    check_suite(recipe, training)
    policy = load_policy(recipe)
    recipe = with_rows(recipe)
    learner = make_learner(recipe, policy)
    async with open_databases(recipe) as databases:
        await check_own_golds(recipe, [*training, *validation], databases)
        faults = [Fault(name) for name in recipe.data.drop]
        training, faulty = await drop_faulty_golds(
            training, databases, faults, lambda done, total: on_done(done, total, "golds")
        )
        env = make_env(recipe, databases, policy.tokenizer)()

        async def that_fit(tasks: list[Task], what: str) -> tuple[list[Task], int]:
            return await drop_long_prompts(
                tasks,
                env,
                policy.history,
                max_prompt=recipe.env.max_prompt,
                on_done=lambda done, total: on_done(done, total, what),
            )

        training, num_long = await that_fit(training, "prompts")
        _, num_unseen = await that_fit(validation, "validation prompts")
    return Prepared(
        policy=policy,
        learner=learner,
        memory=plan_memory(recipe),
        reward_at=reward_at,
        turn_rewards=turn_rewards,
        credit=credit,
        training=training,
        validation=validation,
        left_out=_told(faulty, num_long),
        num_unseen=num_unseen,
    )


def _told(faulty: Counter[Fault], num_long: int) -> str:
    """``left out: 2 golds empty, 1 unstable, 0 prompts too long``."""
    counts = [f"{number} {fault}" for fault, number in faulty.most_common()]
    return f"left out: golds {', '.join(counts) or 'none'}; prompts too long {num_long}"


async def train_locally(recipe: Recipe, run: Run, say: Callable[[str], None]) -> None:
    """Train as the recipe says, from the run's last checkpoint if it has one."""
    if is_finished(run.folder, recipe):
        run.stay_finished()
    else:
        await train_prepared(recipe, await prepare(recipe), run, say)


async def train_prepared(
    recipe: Recipe,
    prepared: Prepared,
    run: Run,
    say: Callable[[str], None],
    on_done: HowFar = _unheard,
    *,
    engine: Engine | None = None,
) -> None:
    """``train_locally`` with what ``prepare`` gave; ``on_done`` hears of each validation.

    ``engine`` is one that may have begun to start: see ``querl.launch.engines``.
    """
    with prepared.learner as learner:
        engine = engine or make_engine(recipe, prepared.policy)
        async with open_player(recipe, prepared.policy, engine=engine) as player:
            say(
                f"{len(prepared.training):,} training tasks ({prepared.left_out}), "
                f"{len(prepared.validation):,} validation tasks "
                f"(prompts too long, hence wrong: {prepared.num_unseen})"
            )
            for warning in (*recipe.warnings(), beyond_positions(recipe)):
                if warning is not None:
                    say(f"warning: {warning}")
            tasks = "\n".join(task.id for task in prepared.training)
            num_tasks = f"{len(prepared.training):,} training tasks"
            checkpoint = run.resume_point(fingerprint(num_tasks, tasks.encode()))
            cursor = 0
            if checkpoint is not None:
                learner.load(checkpoint.folder)
                cursor = checkpoint.cursor["group"]
            placement = await _placement(recipe, prepared, player, say)
            await learner.sleep()  # a server that starts only now finds the GPU free
            await placement.publish(learner.step)
            # what is loaded now stays: looking at it again and again stops thousands of episodes
            gc.collect()
            gc.freeze()
            try:
                await train(
                    recipe.run,
                    _stream(recipe, prepared, player, first_group=cursor),
                    learner,
                    placement=placement,
                    teaching=Teaching(
                        credit=prepared.credit,
                        leave_out=left_out_by(recipe),
                    ),
                    evaluate=_validation(recipe, prepared, player, on_done),
                    log=run,
                )
            finally:
                gc.unfreeze()


async def _placement(
    recipe: Recipe, prepared: Prepared, player: Player, say: Callable[[str], None]
) -> Placement:
    """Where the two live, the probe between them, the plan that an update is held to."""
    learner = prepared.learner
    messages = await player.make_env().reset(prepared.training[0])
    probe = Probe(
        player.engine,
        learner.logprobs,
        player.history.start(messages),
        temperature=recipe.engine.temperature,
        tolerance=recipe.algorithm.max_dlogprob,
    )
    take_turns = recipe.engine.placement == "colocated"
    placement: Placement = (TakingTurns if take_turns else SideBySide)(
        player.engine, learner, probe
    )
    if prepared.memory is None:
        return placement
    say(prepared.memory.table())
    num_steps = recipe.run.num_steps - learner.step
    return MeasuredUpdates(placement, learner, prepared.memory, say=say, num_steps=num_steps)


def left_out_by(recipe: Recipe) -> frozenset[LeftOut]:
    """The recipe's choice, and groups without signal where nothing else moves a weight."""
    chosen = frozenset(LeftOut(name) for name in recipe.algorithm.leave_out)
    algorithm = recipe.algorithm
    says_more = algorithm.loss.get("name", "clip") not in ONLY_ADVANTAGES
    says_more = says_more or algorithm.kl.coefficient > 0 or algorithm.entropy > 0
    says_more = says_more or recipe.lora.anchor > 0
    return chosen if says_more else chosen | {LeftOut.NO_SIGNAL}


def _stream(recipe: Recipe, prepared: Prepared, player: Player, *, first_group: int) -> GroupStream:
    return GroupStream(
        TaskOrder(prepared.training, recipe.run.seed),
        RewardedGroups(
            player=player,
            reward_at=prepared.reward_at,
            reward_parts={name: find_reward(name) for name in recipe.reward.parts},
            turn_rewards=prepared.turn_rewards,
            group_size=recipe.run.group_size,
            seed=recipe.run.seed,
        ),
        player.engine,
        keep=lambda group: has_signal(group, prepared.credit),
        groups_per_step=recipe.run.groups_per_step,
        max_lag=recipe.run.max_lag,
        max_refill=recipe.run.max_refill,
        first_group=first_group,
    )


def _validation(recipe: Recipe, prepared: Prepared, player: Player, on_done: HowFar) -> Evaluate:
    async def score(step: int) -> dict[str, Any]:
        num_done = count(1)
        episodes = await validate(
            player.greedy(),
            prepared.validation,
            seed=recipe.run.seed,
            step=step,
            on_done=lambda _: on_done(next(num_done), len(prepared.validation), "validation"),
        )
        return summarise(episodes)

    return score
