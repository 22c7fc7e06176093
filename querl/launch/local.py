"""One process: learner and engine side by side, built from a recipe."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch

from querl.algorithm.credit import make_credit, reads_turn_rewards
from querl.algorithm.loss import make_loss
from querl.algorithm.loss.correction import Correction
from querl.algorithm.loss.kl import KlPenalty
from querl.algorithm.loss.reduction import Reduction
from querl.config import Recipe
from querl.env.env import Setup
from querl.env.prompts import PromptStyle
from querl.env.registry import find_environment
from querl.env.rewards import SUITE_GAMMA, Weight, find_reward, weighted
from querl.env.schema_text import DescribedSchemas, ShownValues
from querl.env.turn_rewards import TurnRewards, find_turn_reward
from querl.env.wire import ObservationLimits, Observations, Wire
from querl.errors import ConfigError, DataError
from querl.eval.run import Episode, evaluate
from querl.rollout.chat import ChatFormat
from querl.rollout.engine import RequestKey
from querl.rollout.history import HISTORIES, Stepwise, check_can_forget
from querl.rollout.sampler import Player
from querl.sql.compare import CompareMode
from querl.sql.database import Limits
from querl.sql.databases import DatabasesByKind
from querl.sql.inner import InnerJudge, InnerSteps, TurnJudge
from querl.sql.judge import Judge
from querl.sql.schema import SchemaStyle
from querl.sql.suite import load_suite
from querl.trainer.full import FullLearner, UpdateSettings
from querl.trainer.lora import LoraSettings, add_adapter, is_adapter
from querl.trainer.model import choose_device, choose_dtype, load_model, load_tokenizer
from querl.trainer.offload import HostOffload
from querl.trainer.optim import AdamWSettings
from querl.trainer.reference import AdapterOff, FrozenCopy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from querl.algorithm.credit import Credit
    from querl.env.env import Environment
    from querl.env.rewards import Reward, SqlJudge
    from querl.rollout.history import History
    from querl.sql.database import Databases
    from querl.sql.judge import Suite
    from querl.trainer.reference import Reference
    from querl.types import Task

EVALUATION_GROUP = -1  # group ids count from 0, so that no key of a run is met twice
TINY = "tiny"
TINY_FOLDER = Path(__file__).parents[1] / "data" / "demo" / "tiny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """A model's tokenizer, and how it holds a conversation: its weights may be in a server."""

    tokenizer: PreTrainedTokenizerBase
    history: History


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(Speaker):
    """A model that can be asked and trained in this process."""

    model: PreTrainedModel


def model_path(recipe: Recipe) -> Path:
    """The model's folder or file; ``tiny`` is the one in this package."""
    return TINY_FOLDER if recipe.model.path == TINY else Path(recipe.model.path)


def load_speaker(recipe: Recipe) -> Speaker:
    """The recipe's model without its weights. Raises ModelError when it cannot be used."""
    tokenizer = load_tokenizer(model_path(recipe))
    return Speaker(tokenizer=tokenizer, history=make_history(recipe, tokenizer))


def load_policy(recipe: Recipe) -> Policy:
    """The recipe's model. Raises ModelError when it or its tokenizer cannot be used.

    Raises ConfigError for weights in 4 bits on the CPU.
    """
    if recipe.run.num_threads:
        torch.set_num_threads(recipe.run.num_threads)
    speaker = load_speaker(recipe)
    device = choose_device(recipe.model.device)
    if recipe.lora.quantise != "none" and device.type == "cpu":
        raise ConfigError(
            f"lora.quantise={recipe.lora.quantise!r} needs a GPU: set lora.quantise=none"
        )
    return Policy(
        model=load_model(
            model_path(recipe),
            device=device,
            dtype=choose_dtype(device, recipe.model.dtype),
            quantise=recipe.lora.quantise,
        ),
        tokenizer=speaker.tokenizer,
        history=speaker.history,
    )


def make_history(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> History:
    """The recipe's history in the tokenizer's own template, or a plain one where it has none.

    Raises ModelError for a template that cannot be used that way, ConfigError for thoughts that are
    to be dropped where nothing is rendered anew.
    """
    chat, kind = ChatFormat(tokenizer), recipe.env.history
    if recipe.env.keep_thoughts:
        return HISTORIES[kind](chat)
    check_can_forget(kind)
    return Stepwise(chat, keep_thoughts=False)


@asynccontextmanager
async def open_databases(recipe: Recipe) -> AsyncIterator[DatabasesByKind]:
    """What runs all SQL of a run, under the recipe's limits."""
    async with DatabasesByKind(recipe.sql.workers, sql_limits(recipe)) as databases:
        yield databases


def sql_limits(recipe: Recipe) -> Limits:
    """The recipe's limits, the same for the tool and for the reward."""
    return Limits(
        max_steps=recipe.sql.max_steps,
        timeout_s=recipe.sql.timeout_s,
        max_rows=recipe.sql.max_rows,
    )


def make_env(
    recipe: Recipe, databases: Databases, tokenizer: PreTrainedTokenizerBase | None
) -> Callable[[], Environment]:
    """A maker of fresh environments that share what is known of the databases.

    Without a tokenizer a schema's budget counts four characters a token. Raises ConfigError for an
    unknown ``env.kind``.
    """

    def count_tokens(text: str) -> int:
        if tokenizer is None:
            return len(text) // 4
        return len(tokenizer.encode(text, add_special_tokens=False))

    style = PromptStyle(recipe.prompt.style)
    schemas = DescribedSchemas(
        databases,
        style=SchemaStyle.COMPACT if style is PromptStyle.SHORT else SchemaStyle.DDL,
        values=ShownValues(recipe.prompt.values),
        max_tokens=recipe.prompt.max_schema_tokens,
        count_tokens=count_tokens,
    )
    observations = Observations(
        wire=Wire.SKYRL if style is PromptStyle.SKYRL else Wire.QUERL,
        limits=ObservationLimits(
            rows=recipe.env.observation_rows, chars=recipe.env.observation_chars
        ),
        reminders=recipe.env.reminders,
    )
    setup = Setup(
        databases=databases,
        schemas=schemas,
        style=style,
        observations=observations,
        max_turns=recipe.env.max_turns,
        final_answer=recipe.env.final_answer,
        early_exit=recipe.env.early_exit,
    )
    return find_environment(recipe.env.kind)(setup)


def load_reward_suite(recipe: Recipe) -> Suite | None:
    """The suite that rewards are given on. Raises DataError when the folder holds none."""
    return load_suite(Path(recipe.reward.suite)) if recipe.reward.suite is not None else None


def make_judge(recipe: Recipe, databases: Databases, *, golds: Databases | None = None) -> SqlJudge:
    """The recipe's judge; inner queries are run only where a reward pays for them.

    ``golds`` run the gold queries where they are given, ``databases`` all others.
    """
    suite = load_reward_suite(recipe)
    judge = Judge(databases, mode=CompareMode(recipe.reward.judge), suite=suite, golds=golds)
    if "cte" not in recipe.reward.parts:
        return judge
    return InnerJudge(judge, InnerSteps(databases, suite=suite))


def make_turn_judge(recipe: Recipe, databases: Databases) -> TurnJudge | None:
    """What runs inner queries turn by turn, where a turn is paid for them."""
    if "cte" not in recipe.reward.turn_parts:
        return None
    return TurnJudge(InnerSteps(databases, suite=load_reward_suite(recipe)))


def make_reward(recipe: Recipe) -> Callable[[int], Reward]:
    """The recipe's reward of each step.

    Raises ConfigError for an unknown part, and for turns that would be discounted twice.
    """
    discount = recipe.reward.discount
    if discount < 1 and "suite" in recipe.reward.parts:
        raise ConfigError(
            f"reward.discount={discount:g} beside the reward suite, which discounts turns by "
            f"{SUITE_GAMMA:g} itself: leave one out, or take binary, which counts the suite too"
        )
    parts = [
        (find_reward(name), Weight(value=part.weight, until=part.until))
        for name, part in recipe.reward.parts.items()
    ]
    return weighted(parts, num_steps=recipe.run.num_steps, discount=discount)


def make_turn_rewards(recipe: Recipe) -> TurnRewards | None:
    """The recipe's rewards of turns, if any. Raises ConfigError for an unknown part."""
    if not recipe.reward.turn_parts:
        return None
    parts = {
        name: (find_turn_reward(name), Weight(value=part.weight, until=part.until))
        for name, part in recipe.reward.turn_parts.items()
    }
    return TurnRewards(parts=parts, num_steps=recipe.run.num_steps)


def make_recipe_credit(recipe: Recipe) -> Credit:
    """The recipe's credit. Raises ConfigError where turns are paid and it reads no such pay."""
    settings = dict(recipe.algorithm.credit)
    name = settings.pop("name", "grpo_batch_std")
    credit = make_credit(name, **settings)
    pays_turns = any(part.weight for part in recipe.reward.turn_parts.values())
    if pays_turns and not reads_turn_rewards(credit):
        raise ConfigError(
            f"algorithm.credit={name!r} reads no rewards of turns: use turn_index, or give "
            "reward.turn_parts the weight 0, which measures and pays nothing"
        )
    return credit


def check_suite(recipe: Recipe, tasks: Sequence[Task]) -> None:
    """Refuse a suite that knows none of the training tasks: raises DataError."""
    suite = load_reward_suite(recipe)
    if suite is not None and not any(suite.databases(task) for task in tasks):
        raise DataError(
            f"reward.suite={recipe.reward.suite!r} has no database for any training task: "
            "build it on the same data by querl suite build"
        )


def check_base(recipe: Recipe) -> None:
    """Refuse an adapter, which is no model to train: raises ConfigError. Loads nothing."""
    path = model_path(recipe)
    if is_adapter(path):
        raise ConfigError(
            f"model.path={str(path)!r} is an adapter: make a model of it by "
            f"querl export {path} --out FOLDER"
        )


def make_trainable(recipe: Recipe, policy: Policy) -> None:
    """Put the recipe's adapter into the policy, if it has one; else all weights are trained.

    Raises ConfigError for a policy that is an adapter itself.
    """
    check_base(recipe)
    path, lora = model_path(recipe), recipe.lora
    if lora.rank:
        settings = LoraSettings(
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            targets=lora.targets,
            is_rank_stable=lora.rslora,
        )
        add_adapter(policy.model, settings, base=path, seed=recipe.run.seed)


def optimizer_settings(recipe: Recipe, **changed: Any) -> AdamWSettings:
    """The recipe's optimizer, with what another section says of it."""
    return AdamWSettings(
        **recipe.optimizer.model_dump() | changed,
        offload=recipe.learner.offload != "none",
        anchor=recipe.lora.anchor,
        num_steps=recipe.run.num_steps,
    )


def make_learner(recipe: Recipe, policy: Policy) -> FullLearner:
    """The recipe's learner on the policy's own weights, or on an adapter that it puts in.

    Raises ConfigError for what does not fit the policy.
    """
    make_trainable(recipe, policy)
    algorithm = recipe.algorithm
    settings = dict(algorithm.loss)
    name = settings.pop("name", "clip")
    return FullLearner(
        policy.model,
        policy.tokenizer,
        loss=make_loss(name, **settings),
        optimizer=optimizer_settings(recipe),
        update=UpdateSettings(
            temperature=recipe.engine.temperature,
            correction=Correction(**algorithm.correction.model_dump()),
            reduction=Reduction(name=algorithm.reduction, normaliser=algorithm.normaliser),
            kl=KlPenalty(**algorithm.kl.model_dump()),
            entropy=algorithm.entropy,
            minibatches=algorithm.minibatches,
            inner_epochs=algorithm.inner_epochs,
            tokens_per_microbatch=recipe.memory.tokens_per_microbatch,
            share_prefix=recipe.memory.share_prefix,
            checkpoint_activations=recipe.memory.checkpoint_activations,
            compile_layers=recipe.memory.compile,
            fp32_head=recipe.memory.fp32_head,
            max_dlogprob=algorithm.max_dlogprob,
        ),
        reference=_reference(recipe, policy) if algorithm.kl.coefficient else None,
        offload=_offload(recipe, policy),
    )


def _offload(recipe: Recipe, policy: Policy) -> HostOffload | None:
    leaves = recipe.learner.offload == "all" and policy.model.device.type != "cpu"
    return HostOffload(policy.model.device) if leaves else None


def _reference(recipe: Recipe, policy: Policy) -> Reference:
    return AdapterOff(policy.model) if recipe.lora.rank else FrozenCopy(policy.model)


async def validate(
    player: Player,
    tasks: Sequence[Task],
    *,
    seed: int,
    step: int,
    num_samples: int = 1,
    on_done: Callable[[Episode], None] = lambda _: None,
) -> list[Episode]:
    """Play every task ``num_samples`` times as the player samples; ordered by task, then sample."""

    async def episode(task: Task, sample: int) -> Any:
        # by the task's id, so that its random numbers do not depend on the others of a set
        group = EVALUATION_GROUP - crc32(task.id.encode())
        try:
            return await player.play(task, RequestKey(seed, step, group, sample, 0))
        finally:
            player.engine.leave(1)

    return await evaluate(
        tasks,
        episode,
        num_samples=num_samples,
        announce=player.engine.enter,
        on_done=on_done,
    )
