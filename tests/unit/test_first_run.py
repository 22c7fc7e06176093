"""The smallest run from end to end: written answers, and everything else real."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from company import GOLDS, company_recipe, listener, make_company
from tiny_policy import tiny_tokenizer

from querl import records
from querl.algorithm.credit import has_signal, make_credit
from querl.config import Recipe
from querl.env.rewards import find_reward
from querl.env.wire import ACTION_STOPS
from querl.eval.run import summarise
from querl.launch.local import (
    Policy,
    load_policy,
    make_env,
    make_learner,
    open_databases,
    validate,
)
from querl.launch.tasks import choose_tasks
from querl.metrics import Metrics
from querl.rollout.engine import Engine, RequestKey, Sampling
from querl.rollout.episode import EpisodeLimits
from querl.rollout.sampler import Player, RewardedGroups
from querl.rollout.scripted import ScriptedEngine
from querl.rollout.stream import GroupStream, TaskOrder
from querl.run import Run
from querl.sql.database import Databases
from querl.sql.judge import Judge
from querl.train import Teaching, train
from querl.trainer.full import FullLearner

NUM_STEPS = 3
OVERRIDES = (
    f"run.num_steps={NUM_STEPS}",
    "run.group_size=5",
    "run.eval_every=3",
    "run.save_every=3",
    "env.max_turn_tokens=400",
    "algorithm.max_dlogprob=0",  # a script's log-probs are no policy's
)
# Jaccard overlap of the names in `WRONG` with those of each gold, by hand.
WRONG = "SELECT name FROM employee"
OVERLAPS = dict(zip(GOLDS, (2 / 3, 0.0, 2 / 3, 2 / 3), strict=True))


def answer(key: RequestKey, prompt: str) -> str:
    """Sample 0 is right, 1 wrong, 2 broken, 3 right after a look, 4 right with no thought."""
    gold = next(sql for question, sql in GOLDS.items() if question in prompt)
    if key.sample == 3 and key.turn == 0:
        return f"<think>let me look</think><sql>{gold}</sql>"
    if key.sample == 4:
        return f"<solution>{gold}</solution>"
    sql = (gold, WRONG, "SELECT nonsense FROM nowhere", gold)[key.sample]
    return f"<think>that is it</think><solution>{sql}</solution>"


def make_player(recipe: Recipe, policy: Policy, databases: Databases) -> Player:
    return Player(
        make_env=make_env(recipe, databases, policy.tokenizer),
        engine=ScriptedEngine(policy.tokenizer, answer),
        history=policy.history,
        judge=Judge(databases),
        sampling=Sampling(max_tokens=recipe.env.max_turn_tokens, stop=ACTION_STOPS),
        limits=EpisodeLimits(
            max_prompt=recipe.env.max_prompt,
            max_turn_tokens=recipe.env.max_turn_tokens,
            max_input=recipe.env.max_input,
        ),
    )


class ScriptedPlacement:
    """A scripted engine has no weights that a probe could find."""

    def __init__(self, engine: Engine, learner: FullLearner) -> None:
        self._engine = engine
        self._learner = learner

    async def make_room(self) -> Metrics:
        return Metrics()

    async def publish(self, version: int) -> Metrics:
        await self._engine.load_weights(self._learner.weights(), version)
        return Metrics()


async def train_by_script(recipe: Recipe, run: Run, reward: str) -> FullLearner:
    policy = load_policy(recipe)
    learner = make_learner(recipe, policy)
    training, validation = choose_tasks(recipe)
    async with open_databases(recipe) as databases:
        player = make_player(recipe, policy, databases)

        async def score(step: int) -> dict[str, object]:
            return summarise(await validate(player.greedy(), validation, seed=0, step=step))

        stream = GroupStream(
            TaskOrder(training, 0),
            RewardedGroups(
                player=player, reward_at=lambda _: find_reward(reward), group_size=5, seed=0
            ),
            player.engine,
            keep=lambda group: has_signal(group, make_credit("grpo")),
            groups_per_step=recipe.run.groups_per_step,
        )
        await train(
            recipe.run,
            stream,
            learner,
            placement=ScriptedPlacement(player.engine, learner),
            teaching=Teaching(credit=make_credit("grpo"), leave_out=frozenset()),
            evaluate=score,
            log=run,
        )
    return learner


def expected_rewards(reward: str, question: str) -> tuple[float, ...]:
    """(right, runs but is wrong, does not run, right after a look, right with no thought)."""
    return {
        "binary": (1.0, 0.0, 0.0, 1.0, 0.0),
        "skyrl": (1.0, 0.0, 0.0, 1.0, -1.0),
        "composite": (1.2, 0.1 + 0.2 + 0.3 * OVERLAPS[question], -0.5 + 0.2, 1.2, -0.5),
    }[reward]


@pytest.mark.parametrize("reward", ["binary", "skyrl", "composite"])
def test_three_steps_reward_each_answer_as_the_table_says_and_update_the_model(
    tmp_path: Path, reward: str
) -> None:
    recipe = company_recipe(make_company(tmp_path / "company"), *OVERRIDES)
    heard = listener()
    with Run(tmp_path / "run", recipe, heard, fresh=False) as run:
        before = [p.clone() for p in load_policy(recipe).model.parameters()]
        learner = asyncio.run(train_by_script(recipe, run, reward))
        last = run.checkpoints.last()
    assert learner.step == NUM_STEPS
    assert heard.steps == [1, 2, 3]
    assert any(
        not a.equal(b) for a, b in zip(before, learner.weights().module.parameters(), strict=True)
    )
    assert last is not None
    assert (last.step, last.cursor["group"]) == (NUM_STEPS, NUM_STEPS * 2)
    check_records(tmp_path / "run" / "records", reward)
    check_numbers(tmp_path / "run")


def check_records(folder: Path, reward: str) -> None:
    assert records.steps(folder) == [1, 2, 3]
    for step in records.steps(folder):
        lines = records.read_step(folder, step)
        assert len(lines) == 2 * 5
        for line in lines:
            expected = expected_rewards(reward, line["question"])[line["sample"]]
            assert line["reward"] == pytest.approx(expected)
            verdicts = ("match", "mismatch", "not_run", "match", "bad_format")
            assert line["verdict"] == verdicts[line["sample"]]
            assert len(line["turns"]) == (2 if line["sample"] == 3 else 1)
        versions = records.read_tokens(folder, step)["versions"]
        assert set(versions.tolist()) == {step - 1}


def check_numbers(folder: Path) -> None:
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(line["rollout/right"] == 0.4 for line in metrics)
    assert all(line["rollout/used_tool"] == 0.2 for line in metrics)
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    assert [(json.loads(line)["step"], json.loads(line)["accuracy"]) for line in lines] == [
        (0, 1.0),
        (3, 1.0),
    ]
    assert (folder / "checkpoints" / "best" / "model" / "model.safetensors").exists()


def test_the_written_answers_pass_through_the_tokenizer_unchanged() -> None:
    tokenizer = tiny_tokenizer()
    for question in GOLDS:
        text = answer(RequestKey(0, 0, 0, 0, 0), question)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
