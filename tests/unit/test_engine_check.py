"""``querl doctor --engine``: promises kept and broken, told a line each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from company import make_company
from console import Querl
from engines import SmallSglang, SmallVllm, install, processes

from querl.errors import EngineError
from querl.rollout import sglang, vllm
from querl.rollout.engine import Sampling
from querl.rollout.hf import HfEngine

DEMO = Path(__file__).parents[2] / "recipes" / "demo.toml"


@pytest.fixture
def company(tmp_path: Path) -> Path:
    return make_company(tmp_path / "company")


def broken(out: str) -> list[str]:
    """The promises that were broken."""
    lines = [line for line in out.splitlines() if line.startswith("BROKEN")]
    return [line.split(":")[0].split("  ")[1] for line in lines]


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
    assert broken(out) == [
        "new weights are what it samples from, and no cache survives",
        "it sleeps, is given weights, and wakes",
    ]


def test_weights_that_do_not_arrive_are_found_though_no_two_answers_are_the_same(
    querl: Querl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU rounding moves what a prompt is answered, whoever's weights answer."""
    answered, noise = HfEngine.generate, itertools.count()

    async def rounded(self, prompt_ids, sampling, key):
        found = await answered(self, prompt_ids, sampling, key)
        apart = 1e-3 * (next(noise) % 7)
        return replace(found, logprobs=tuple(logprob - apart for logprob in found.logprobs))

    async def deaf(self, weights, version):
        self._version = version

    monkeypatch.setattr(HfEngine, "generate", rounded)
    arguments = ("doctor", "--engine", "hf", DEMO, "engine.placement=separate", "lora.rank=4")
    assert querl(*arguments)[0] == 0
    monkeypatch.setattr(HfEngine, "load_weights", deaf)
    code, out, _ = querl(*arguments)
    assert code == 1
    assert broken(out) == [
        "new weights are what it samples from, and no cache survives",
        "it sleeps, is given weights, and wakes",
    ]


def test_an_engine_that_samples_where_it_should_be_greedy_is_found(
    querl: Querl, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = HfEngine.generate

    async def never_greedy(self, prompt_ids, sampling, key):
        temperature = sampling.temperature or 1.0
        return await answered(self, prompt_ids, replace(sampling, temperature=temperature), key)

    monkeypatch.setattr(HfEngine, "generate", never_greedy)
    code, out, _ = querl("doctor", "--engine", "hf")
    assert code == 1
    assert "greedy sampling repeats itself, whatever the key" in broken(out)


class Unseeded(SmallSglang):
    """As SGLang itself, which passes over seeds unless it is started to follow them."""

    num_asked = 0

    def request(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int
    ) -> tuple[str, dict[str, Any]]:
        self.num_asked += 1
        return super().request(prompt_ids, sampling, seed=self.num_asked)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.slow
def test_a_server_keeps_its_promises(
    querl: Querl, company: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(vllm, "Vllm", SmallVllm)
    monkeypatch.setattr(sglang, "Sglang", Unseeded)
    install(kind, monkeypatch)
    code, out, err = querl("doctor", company / "recipe.toml", "--engine", kind)
    assert (code, broken(out), err) == (0, [], "")
    assert ("enable_deterministic_inference" in out) == (kind == "sglang")
    assert processes(company) == []


@pytest.mark.slow
def test_seeds_are_promised_by_an_sglang_that_is_started_to_follow_them(
    querl: Querl, company: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang, "Sglang", Unseeded)
    install("sglang", monkeypatch)
    follows = "engine.options={enable_deterministic_inference=true}"
    code, out, _ = querl("doctor", company / "recipe.toml", "--engine", "sglang", follows)
    assert code == 1
    assert broken(out) == ["a key decides what is sampled"]


def test_a_server_elsewhere_is_not_asked_to_sleep(
    querl: Querl, company: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the recipe says of its own engine holds: nobody computes on the GPUs of that one."""
    asked: list[bool] = []

    class Seen(SmallVllm):
        def __init__(self, settings: vllm.VllmSettings) -> None:
            super().__init__(settings)
            asked.append(settings.sleeps)

    monkeypatch.setattr(vllm, "Vllm", Seen)
    recipe = company / "recipe.toml"
    with recipe.open("a", encoding="utf-8") as file:
        file.write('[engine]\nkind = "vllm"\nplacement = "separate"\nurl = "http://127.0.0.1:1"\n')
    code, out, _ = querl("doctor", recipe, "--engine", "vllm", "engine.start_timeout_s=0.1")
    assert code == 1
    assert "not ready after 0.1 s" in out
    assert asked == [False]


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
