"""``querl doctor --engine``: promises kept and broken, told a line each."""

from __future__ import annotations

from pathlib import Path

import pytest
from console import Querl

from querl.errors import EngineError
from querl.rollout.hf import HfEngine


def test_the_engine_of_this_process_keeps_its_promises(querl: Querl) -> None:
    code, out, err = querl("doctor", "--engine", "hf")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 8
    assert all(line.startswith("kept") for line in lines)


def test_an_engine_that_keeps_old_weights_is_found(
    querl: Querl, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = HfEngine.generate
    kept: dict[object, object] = {}

    async def stale(self, prompt_ids, sampling, key):
        """As if a cache had outlived its weights."""
        call = (prompt_ids, sampling, key)
        if call not in kept:
            kept[call] = await answered(self, prompt_ids, sampling, key)
        return kept[call]

    monkeypatch.setattr(HfEngine, "generate", stale)
    code, out, _ = querl("doctor", "--engine", "hf")
    assert code == 1
    broken = [line for line in out.splitlines() if line.startswith("BROKEN")]
    assert [line.split(":")[0].split("  ")[1] for line in broken] == [
        "new weights are what it samples from, and no cache survives",
        "it sleeps, is given weights, and wakes",
    ]
    assert "not moved" in broken[0]


def test_an_engine_that_fails_says_why(querl: Querl, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self, prompt_ids, sampling, key):
        raise EngineError("the GPU is out of memory")

    monkeypatch.setattr(HfEngine, "generate", fail)
    code, out, _ = querl("doctor", "--engine", "hf")
    assert code == 1
    assert out.splitlines() == ["BROKEN  it answers what it is asked: the GPU is out of memory"]


def test_an_engine_that_cannot_train_is_refused_before_anything_starts(querl: Querl) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "demo.toml"
    endpoint = "engine.url=http://127.0.0.1:1/v1"
    code, out, err = querl("doctor", recipe, endpoint, "--engine", "openai")
    assert (code, out) == (2, "")
    assert "tells no token ids" in err
