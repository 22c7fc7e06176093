"""Whole runs whose episodes are sampled by a server of its own process, taking turns with it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from company import company_recipe, listener, make_company
from console import Querl
from engines import SmallVllm, install, processes

from querl import records
from querl.errors import EngineError
from querl.launch import local
from querl.launch.training import train_locally
from querl.rollout import vllm
from querl.rollout.server import ServerProcess
from querl.run import Run
from querl.trainer.checkpoint import RunLock

SERVED = ("engine.kind=vllm", "engine.placement=colocated", "run.num_steps=2")


@pytest.fixture
def company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small server stands in for vLLM: the same flags and routes, a real model."""
    monkeypatch.setattr(vllm, "Vllm", SmallVllm)
    install("vllm", monkeypatch)
    return make_company(tmp_path / "company")


def train(company: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """A line of numbers a step."""
    recipe = company_recipe(company, *SERVED, *overrides)
    with Run(folder, recipe, listener(), fresh=False) as run:
        asyncio.run(train_locally(recipe, run, print))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="full"),
        pytest.param(("lora.rank=4", "lora.alpha=64"), id="lora", marks=pytest.mark.slow),
    ],
)
def test_what_is_learnt_arrives_in_the_server(
    tmp_path: Path, company: Path, overrides: tuple[str, ...]
) -> None:
    moving = ("optimizer.lr=0.01", "algorithm.kl=0.1")
    steps = train(company, tmp_path / "run", *moving, *overrides)
    assert [step["engine/restarts"] for step in steps] == [0, 0]
    for step in steps:
        assert step["probe/abs_dlogprob"] < 1e-4
        assert step["sampler/abs_dlogprob"] < 1e-4
    assert processes(company) == []


@pytest.mark.slow
def test_a_server_that_dies_in_mid_rollout_is_started_anew_and_the_run_goes_on(
    tmp_path: Path, company: Path
) -> None:
    steps = train(company, tmp_path / "run", "engine.options={dies-at=20}")
    assert len(steps) == 2
    assert steps[-1]["engine/restarts"] == 1
    assert all(step["sampler/abs_dlogprob"] < 1e-4 for step in steps)
    assert processes(company) == []


@pytest.mark.slow
def test_a_server_that_keeps_dying_ends_the_run_with_its_reason(
    tmp_path: Path, company: Path
) -> None:
    with pytest.raises(EngineError, match=r"(?s)failed again .*told to die"):
        train(company, tmp_path / "run", "engine.options={dies-at=3}")
    assert processes(company) == []


def test_a_mistake_in_a_recipe_leaves_no_server_behind(company: Path, querl: Querl) -> None:
    recipe = company / "recipe.toml"
    code, _, err = querl("train", recipe, *SERVED, "reward.parts={nonsense=1}")
    assert code == 2
    assert "nonsense" in err
    assert processes(company) == []


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What servers were started with."""
    begun: list[str] = []
    launch = ServerProcess.launch

    def noted(self: ServerProcess) -> None:
        begun.append("a server")
        launch(self)

    monkeypatch.setattr(ServerProcess, "launch", noted)
    return begun


def test_a_folder_in_use_is_refused_before_a_server_takes_its_run_s_memory(
    tmp_path: Path, company: Path, querl: Querl, starts: list[str]
) -> None:
    arguments = ("train", company / "recipe.toml", *SERVED, "--out", tmp_path / "run")
    with RunLock(tmp_path / "run"):
        code, _, err = querl(*arguments)
    assert code == 2
    assert "in use by process" in err
    assert starts == []


@pytest.mark.slow
def test_for_a_finished_run_no_server_is_started(
    tmp_path: Path, company: Path, querl: Querl, starts: list[str]
) -> None:
    arguments = ("train", company / "recipe.toml", *SERVED, "--out", tmp_path / "run")
    assert querl(*arguments)[0] == 0
    assert "a server" in starts
    starts.clear()
    code, out, err = querl(*arguments)
    assert starts == []
    assert (code, err) == (0, "")
    assert "holds a finished run" in out
    assert "validation accuracy" in out
    assert processes(company) == []


@pytest.mark.slow
def test_a_run_is_evaluated_at_a_server(company: Path, querl: Querl) -> None:
    code, out, err = querl("eval", company / "recipe.toml", *SERVED)
    assert (code, err) == (0, "")
    assert "accuracy" in out
    assert processes(company) == []


@pytest.mark.slow
def test_a_run_s_adapter_says_at_a_server_what_it_says_here(
    tmp_path: Path, company: Path, querl: Querl
) -> None:
    moving = ("optimizer.lr=0.05", "lora.rank=4", "lora.alpha=64")
    train(company, tmp_path / "run", *moving)
    here = ("engine.kind=hf", "engine.placement=shared")
    for arguments in (
        ("eval", tmp_path / "run", "--out", tmp_path / "server"),
        ("eval", tmp_path / "run", *here, "--out", tmp_path / "here"),
        ("eval", company / "recipe.toml", "--out", tmp_path / "base"),
    ):
        assert querl(*arguments)[0] == 0
    server, ours, before = (said(tmp_path / name) for name in ("server", "here", "base"))
    assert server == ours != before
    assert processes(company) == []


@pytest.mark.slow
def test_traces_of_a_server_s_own_model_load_no_second_one_here(
    tmp_path: Path, company: Path, querl: Querl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the server has the weights, and little memory beside them")

    monkeypatch.setattr(local, "load_model", refuse)
    own = ("--samples", "2", "sft.shares={sampled=1.0}", "--out", tmp_path / "traces.jsonl")
    code, _, err = querl("data", "traces", company / "recipe.toml", *SERVED, *own)
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "traces.report.json").read_text(encoding="utf-8"))
    assert report["samples"]["episodes"] == 8
    assert processes(company) == []


def said(folder: Path) -> list[str]:
    """What the model said in each turn of an evaluation."""
    return [
        turn.text
        for group in records.read_groups(folder, 0)
        for trajectory in group.trajectories
        for turn in trajectory.turns
    ]
