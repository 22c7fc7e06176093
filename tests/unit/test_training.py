"""A training run, where something about it is odd and it must go on."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
from company import company_recipe, listener, make_company
from safetensors.torch import load_file

from querl import records
from querl.durable import read_lines
from querl.errors import EngineError
from querl.launch.training import prepare, train_locally, train_prepared
from querl.rollout.hf import HfEngine
from querl.rollout.probe import PROBE_GROUP
from querl.run import Run


def test_a_step_that_can_teach_nothing_is_counted_and_moves_no_weight(tmp_path: Path) -> None:
    company = make_company(tmp_path / "company")
    overrides = ("run.num_steps=2", "reward.parts={binary=1}", "optimizer.weight_decay=0.5")
    recipe = company_recipe(company, *overrides)  # random weights answer nothing right
    with Run(tmp_path / "run", recipe, listener(), fresh=False) as run:
        asyncio.run(train_locally(recipe, run, print))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["left_out/no_signal"] for step in steps] == [4, 4]
    assert [step["tokens/trained"] for step in steps] == [0, 0]
    before = load_file(company / "model" / "model.safetensors")
    after = load_file(tmp_path / "run/checkpoints/last/model/model.safetensors")
    assert all(after[name].equal(before[name]) for name in before)


def test_a_run_that_has_ended_leaves_no_thread(tmp_path: Path) -> None:
    recipe = company_recipe(make_company(tmp_path / "company"), "run.num_steps=1")
    before = set(threading.enumerate())
    with Run(tmp_path / "run", recipe, listener(), fresh=False) as run:
        prepared = asyncio.run(prepare(recipe))  # held, so that no garbage collection helps
        asyncio.run(train_prepared(recipe, prepared, run, print))
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert left == []


@pytest.mark.parametrize(
    "when",
    [
        "rollout",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("publish", "validation")),
    ],
)
def test_an_engine_that_fails_for_good_costs_no_more_than_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The third step's engine is lost; the run is saved, and goes on as if nothing had happened."""
    recipe = company_recipe(
        make_company(tmp_path / "company"),
        *("run.num_steps=4", "run.save_every=4", "run.eval_every=3"),
    )
    generate, load = HfEngine.generate, HfEngine.load_weights

    async def lost_in_sampling(self, prompt_ids, sampling, key):
        lost_at = {"rollout": 2, "validation": 3}[when]
        if self.version == lost_at and key.group > PROBE_GROUP:
            raise EngineError("the server ended")
        return await generate(self, prompt_ids, sampling, key)

    async def lost_in_publish(self, weights, version):
        if version == 3:
            raise EngineError("the server ended")
        await load(self, weights, version)

    with monkeypatch.context() as broken, Run(tmp_path / "a", recipe, listener(), fresh=False) as a:
        if when == "publish":
            broken.setattr(HfEngine, "load_weights", lost_in_publish)
        else:
            broken.setattr(HfEngine, "generate", lost_in_sampling)
        with pytest.raises(EngineError, match="the server ended"):
            asyncio.run(train_locally(recipe, a, print))
        last = a.checkpoints.last()
        assert last is not None
        assert last.step == (2 if when == "rollout" else 3)
    for name in ("a", "b"):
        with Run(tmp_path / name, recipe, listener(), fresh=False) as run:
            asyncio.run(train_locally(recipe, run, print))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_validation_that_the_engine_was_lost_in_is_made_by_the_run_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one, so that the policy it is of would have no number and never be the best."""
    recipe = company_recipe(make_company(tmp_path / "company"), "run.num_steps=3")
    generate = HfEngine.generate

    async def lost(self, prompt_ids, sampling, key):
        if self.version == 3 and key.group > PROBE_GROUP:
            raise EngineError("the server ended")
        return await generate(self, prompt_ids, sampling, key)

    with monkeypatch.context() as broken, Run(tmp_path / "a", recipe, listener(), fresh=False) as a:
        broken.setattr(HfEngine, "generate", lost)
        with pytest.raises(EngineError, match="the server ended"):
            asyncio.run(train_locally(recipe, a, print))
        last = a.checkpoints.last()
        assert last is not None
        assert (last.step, last.score) == (3, None)
    with Run(tmp_path / "a", recipe, listener(), fresh=False) as a:
        asyncio.run(train_locally(recipe, a, print))
        last = a.checkpoints.last()
        assert last is not None
        assert (last.step, last.score) == (3, a.evaluations()[-1]["accuracy"])
        assert [line["step"] for line in a.evaluations()] == [0, 2, 3]


def assert_same_run(folder: Path, whole: Path) -> None:
    """Weights, episodes, validations, and a line of numbers for each step."""
    ends = [load_file(run / "checkpoints/last/model/model.safetensors") for run in (folder, whole)]
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[1])
    assert records.steps(folder / "records") == records.steps(whole / "records")
    for file in ("evaluations.jsonl", "metrics.jsonl", "slowest.jsonl"):
        lines = [read_lines(run / file) for run in (folder, whole)]
        assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    scores = [run / "checkpoints" / "scores.json" for run in (folder, whole)]
    assert set(json.loads(scores[1].read_text())) <= set(json.loads(scores[0].read_text()))


def test_a_step_names_the_episodes_that_it_waited_for_longest(tmp_path: Path) -> None:
    recipe = company_recipe(make_company(tmp_path / "company"), "run.num_steps=2")
    with Run(tmp_path / "run", recipe, listener(), fresh=False) as run:
        asyncio.run(train_locally(recipe, run, print))
    lines = (tmp_path / "run" / "slowest.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        seconds = [episode["seconds"] for episode in step["episodes"]]
        assert len(seconds) == min(10, recipe.run.groups_per_step * recipe.run.group_size)
        assert seconds == sorted(seconds, reverse=True)
        assert all(episode["task"] and episode["turns"] >= 1 for episode in step["episodes"])


def test_questions_too_long_to_be_put_are_told_for_training_and_validation(tmp_path: Path) -> None:
    company = make_company(tmp_path / "company")
    for name in ("train.jsonl", "val.jsonl"):
        with (company / name).open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"question": "Who? " * 9000, "sql": "SELECT 1"}))
    recipe = company_recipe(company, "run.num_steps=1", "env.max_prompt=6000")
    hearer = listener()
    with Run(tmp_path / "run", recipe, hearer, fresh=False) as run:
        asyncio.run(train_locally(recipe, run, hearer.say))
    assert hearer.said[0] == (
        "4 training tasks (left out: golds none; prompts too long 1), "
        "3 validation tasks (prompts too long, hence wrong: 1)"
    )
