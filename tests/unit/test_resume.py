"""A run that was stopped, or killed, goes on as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from company import company_recipe, listener, make_company
from safetensors.torch import load_file

from querl import records
from querl.durable import read_lines
from querl.errors import CheckpointError, ConfigError
from querl.launch.training import train_locally
from querl.run import Run
from querl.trainer.checkpoint import Checkpoints
from querl.trainer.learner import Learner

TESTS = Path(__file__).parents[1]
RESUME_SCRIPT = """
import asyncio, sys
from pathlib import Path
from company import company_recipe, listener
from querl.launch.training import train_locally
from querl.run import Run
company, folder, *overrides = sys.argv[1:]
recipe = company_recipe(Path(company), *overrides)
with Run(Path(folder), recipe, listener(), fresh=False) as run:
    asyncio.run(train_locally(recipe, run, print))
"""


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_company(tmp_path_factory.mktemp("company"))


def train(company: Path, folder: Path, *overrides: str, fresh: bool = False) -> list[str]:
    recipe = company_recipe(company, *overrides)
    folder.mkdir(exist_ok=True)
    heard = listener()
    with Run(folder, recipe, heard, fresh=fresh) as run:
        asyncio.run(train_locally(recipe, run, heard.say))
    return heard.said


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / name / "model" / "model.safetensors")


def assert_same_run(folder: Path, whole: Path) -> None:
    """Weights, trajectories and tokens are equal to the last bit."""
    resumed, straight = weights(folder), weights(whole)
    assert resumed.keys() == straight.keys()
    assert all(resumed[name].equal(straight[name]) for name in straight)
    steps = records.steps(whole / "records")
    assert records.steps(folder / "records") == steps
    for step in steps:
        ours = records.read_tokens(folder / "records", step)
        theirs = records.read_tokens(whole / "records", step)
        assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.fixture(scope="module")
def whole(company: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without a break."""
    folder = tmp_path_factory.mktemp("whole")
    train(company, folder)
    return folder


def test_the_run_teaches_something_so_that_equal_weights_mean_something(
    company: Path, whole: Path
) -> None:
    start = load_file(company / "model" / "model.safetensors")
    after = weights(whole)
    assert any(not after[name].equal(start[name]) for name in start)


def test_two_steps_and_two_after_a_resume_are_four_steps_bit_for_bit(
    company: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train(company, folder, "run.num_steps=2")
    halfway = weights(folder)
    assert any(not halfway[name].equal(one) for name, one in weights(whole).items())
    said = train(company, folder, "run.num_steps=4")
    assert "resuming after step 2" in said
    assert_same_run(folder, whole)


def test_a_killed_run_resumes_bit_for_bit(company: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-c", RESUME_SCRIPT, str(company), str(folder), "run.save_every=1"]
    process = subprocess.Popen(
        command,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join((str(TESTS), str(TESTS.parent)))),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "checkpoints" / "last").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))  # a moment of chance: any must do
    finally:
        process.kill()
        _, complaint = process.communicate()
    assert process.returncode == -signal.SIGKILL, complaint.decode()
    train(company, folder, "run.save_every=1")
    assert_same_run(folder, whole)


def test_a_finished_run_that_is_started_again_changes_nothing(company: Path, whole: Path) -> None:
    before = weights(whole)
    train(company, whole)
    assert all(weights(whole)[name].equal(one) for name, one in before.items())


def test_a_second_run_on_a_folder_is_refused_with_the_pid_of_the_first(
    company: Path, tmp_path: Path
) -> None:
    recipe = company_recipe(company)
    with (
        Run(tmp_path, recipe, listener(), fresh=False),
        pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()}"),
        Run(tmp_path, recipe, listener(), fresh=True),
    ):
        pass


def test_a_changed_recipe_on_the_folder_of_a_run_is_refused(company: Path, whole: Path) -> None:
    before = (whole / "recipe.toml").read_text()
    recipe = company_recipe(company, "optimizer.lr=0.5")
    with (
        pytest.raises(ConfigError, match=r"optimizer\.lr = 0\.01, not 0\.5"),
        Run(whole, recipe, listener(), fresh=False),
    ):
        pass
    assert (whole / "recipe.toml").read_text() == before
    # and the refusal gave the folder back
    with Run(whole, company_recipe(company), listener(), fresh=False):
        pass


def test_what_an_engine_s_failure_asks_to_change_may_be_changed(
    company: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last").symlink_to("step-000004")
    served = ("engine.kind=vllm", "engine.placement=colocated")
    recipe = company_recipe(company, *served)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    remedies = ("engine.start_timeout_s=900", "engine.heartbeat_s=60", "engine.memory_share=0.5")
    for remedy in (*remedies, "engine.python=/opt/vllm/bin/python", "engine.url=http://gpu2:8000"):
        with Run(tmp_path, company_recipe(company, *served, remedy), listener(), fresh=False):
            pass
    with (
        pytest.raises(ConfigError, match=r"engine\.temperature = 1\.0, not 0\.5"),
        Run(
            tmp_path,
            company_recipe(company, *served, "engine.temperature=0.5"),
            listener(),
            fresh=False,
        ),
    ):
        pass


def test_a_file_spelt_in_another_way_is_the_same_and_another_file_is_not(
    company: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last").symlink_to("step-000004")
    (tmp_path / "recipe.toml").write_text(company_recipe(company).to_toml(), encoding="utf-8")
    monkeypatch.chdir(company.parent)
    name = company.name
    relative = company_recipe(
        company, f"data.source=files:{name}", f"model.path={name}/../{name}/model"
    )
    with Run(tmp_path, relative, listener(), fresh=False):
        assert f'path = "{name}/../{name}/model"' in (tmp_path / "recipe.toml").read_text()
    for other in (f"model.path={name}", "data.source=files:.", f"data.source=spider:{name}"):
        with (
            pytest.raises(ConfigError, match="set it back to resume"),
            Run(tmp_path, company_recipe(company, other), listener(), fresh=False),
        ):
            pass


def test_the_package_s_own_model_is_no_folder_of_that_name(
    company: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last").symlink_to("step-000004")
    tiny = company_recipe(company, "model.path=tiny")
    (tmp_path / "recipe.toml").write_text(tiny.to_toml(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"model\.path = 'tiny', not './tiny'"),
        Run(tmp_path, company_recipe(company, "model.path=./tiny"), listener(), fresh=False),
    ):
        pass


def test_a_run_keeps_no_password_of_a_server_and_needs_none_to_resume(
    company: Path, tmp_path: Path
) -> None:
    url = "postgresql://reader:secret@host:5/shop?password=secret&sslmode=require"
    recipe = company_recipe(company, f"data.db={url}", "data.questions=q.csv")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last").symlink_to("step-000004")
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")  # of an older run
    with Run(tmp_path, recipe, listener(), fresh=False):
        kept = (tmp_path / "recipe.toml").read_text()
    assert "secret" not in kept
    assert "postgresql://reader@host:5/shop?sslmode=require" in kept
    bare = company_recipe(
        company, "data.db=postgresql://reader@host:5/shop?sslmode=require", "data.questions=q.csv"
    )
    with Run(tmp_path, bare, listener(), fresh=False):
        pass


@pytest.mark.parametrize(
    "hangs_on_length",
    ["optimizer.schedule=cosine", "reward.parts={binary={weight=1.0, until=0.5}}"],
)
def test_a_run_whose_steps_hang_on_its_length_is_not_made_longer(
    company: Path, tmp_path: Path, hangs_on_length: str
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last").symlink_to("step-000004")
    plain, bound = (company_recipe(company, *over) for over in ((), (hangs_on_length,)))
    (tmp_path / "recipe.toml").write_text(bound.to_toml(), encoding="utf-8")
    longer = company_recipe(company, hangs_on_length, "run.num_steps=9")
    with (
        pytest.raises(ConfigError, match=r"run\.num_steps = 4, not 9: set it back to resume"),
        Run(tmp_path, longer, listener(), fresh=False),
    ):
        pass
    (tmp_path / "recipe.toml").write_text(plain.to_toml(), encoding="utf-8")
    with Run(tmp_path, company_recipe(company, "run.num_steps=9"), listener(), fresh=False):
        pass


class Stopped(Exception):
    """A kill, at a place that a test chooses."""


class KilledRun(Run):
    """A run that ends inside ``save`` of a step, before or after the checkpoint is written."""

    def __init__(self, *args: Any, before_saving: bool, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._before_saving = before_saving

    def save(self, step: int, learner: Learner, cursor: int) -> None:
        if not self._before_saving:
            self.write(learner, group=cursor)
        raise Stopped


def train_until_killed(company: Path, folder: Path, *, before_saving: bool) -> None:
    recipe, heard = company_recipe(company), listener()
    with (
        pytest.raises(Stopped),
        KilledRun(folder, recipe, heard, fresh=False, before_saving=before_saving) as run,
    ):
        asyncio.run(train_locally(recipe, run, heard.say))


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder / "checkpoints")


def last_evaluation(folder: Path) -> dict[str, Any]:
    return read_lines(folder / "evaluations.jsonl")[-1]


def metric_steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize("before_saving", [True, False])
def test_a_kill_around_a_checkpoint_loses_no_numbers_and_no_rating(
    company: Path, whole: Path, tmp_path: Path, before_saving: bool
) -> None:
    train_until_killed(company, tmp_path, before_saving=before_saving)
    assert metric_steps(tmp_path) == [1, 2]
    train(company, tmp_path, "run.num_steps=2")
    assert metric_steps(tmp_path) == [1, 2]
    last, best = checkpoints(tmp_path).last(), checkpoints(tmp_path).best()
    assert last is not None
    assert last == best
    assert (last.step, last.score) == (2, last_evaluation(tmp_path)["accuracy"])
    train(company, tmp_path)
    assert metric_steps(tmp_path) == [1, 2, 3, 4]
    assert_same_run(tmp_path, whole)


def test_a_run_is_not_resumed_on_other_tasks(company: Path, tmp_path: Path) -> None:
    train(company, tmp_path, "run.num_steps=2")
    questions = company / "train.jsonl"
    before = questions.read_text()
    try:
        questions.write_text("".join(before.splitlines(keepends=True)[:3]))
        with pytest.raises(ConfigError, match=r"a run on 4 training tasks .* not on 3 .*--fresh"):
            train(company, tmp_path)
    finally:
        questions.write_text(before)
    assert "resuming after step 2" in train(company, tmp_path)


def test_a_run_resumes_with_the_threads_that_it_began_with(company: Path, tmp_path: Path) -> None:
    """Two runs of one and of two threads differ, so a resume must not take the machine's number."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train(company, tmp_path, "run.num_threads=0", "run.num_steps=2")
        torch.set_num_threads(1)
        said = train(company, tmp_path, "run.num_threads=0")
        assert "computing with 2 threads, as the run so far" in said
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    last = checkpoints(tmp_path).last()
    assert last is not None
    assert (last.step, last.num_threads) == (4, 2)


def test_a_finished_run_says_how_to_start_over_and_keeps_what_follows_from_its_recipe(
    company: Path, whole: Path
) -> None:
    assert f"{whole} holds a finished run: to start over, add --fresh" in train(company, whole)
    derived = json.loads((whole / "derived.json").read_text())
    assert derived == company_recipe(company).derived()
    assert derived["trajectories in all"] == 16
