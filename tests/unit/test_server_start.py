"""When a server of ours begins to start: beside a learner that stays, after one that leaves."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from company import make_company
from console import Querl
from engines import SmallVllm, install, processes

from querl.launch import training
from querl.rollout import vllm
from querl.rollout.server import ServerProcess
from querl.trainer.full import FullLearner

SERVED = ("engine.kind=vllm", "engine.placement=colocated", "run.num_steps=1", "run.eval_every=1")


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called, in order."""
    seen: list[str] = []

    def note(owner: Any, name: str) -> None:
        called: Callable[..., Any] = vars(owner)[name]

        @wraps(called)
        def noted(*args: Any, **named: Any) -> Any:
            seen.append(name)
            return called(*args, **named)

        monkeypatch.setattr(owner, name, noted)

    note(ServerProcess, "launch")
    note(FullLearner, "sleep")
    note(training, "load_policy")
    return seen


@pytest.mark.parametrize(
    ("offload", "order"),
    [
        pytest.param("optimizer", ["launch", "load_policy", "sleep"], marks=pytest.mark.slow),
        ("all", ["load_policy", "sleep", "launch"]),
    ],
)
def test_a_server_starts_when_a_learner_that_leaves_the_gpu_has_left_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    querl: Querl,
    happened: list[str],
    offload: str,
    order: list[str],
) -> None:
    monkeypatch.setattr(vllm, "Vllm", SmallVllm)
    install("vllm", monkeypatch)
    company = make_company(tmp_path / "company")
    settings = (*SERVED, f"learner.offload={offload}")
    code, _, err = querl("train", company / "recipe.toml", *settings, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert sorted(order, key=happened.index) == order
    assert processes(company) == []
