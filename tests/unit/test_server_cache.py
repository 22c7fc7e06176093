"""The cache that a server is started with: what a learner beside it leaves, or a plain refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from company import company_recipe, make_company

from querl.config import Recipe
from querl.errors import ConfigError
from querl.launch.needs import ASSUMED_GPU_BYTES, plan_settings, server_cache, server_share
from querl.trainer.plan import CONTEXT_BYTES, plan
from querl.trainer.shapes import PUBLISHED

SERVED = ("engine.kind=vllm", "engine.placement=colocated", "env.max_input=8000")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is assumed, of one size everywhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def company(tmp_path: Path) -> Path:
    return make_company(tmp_path)


def served(company: Path, size: str, *overrides: str) -> Recipe:
    named = f"model.path=Qwen2.5-Coder-{size}-Instruct"
    return company_recipe(company, *SERVED, named, *overrides)


def test_a_cache_is_what_the_learner_beside_it_leaves(company: Path) -> None:
    many = ("run.groups_per_step=500", "run.group_size=8", "engine.max_batch=512")
    stays = served(company, "3B", "learner.offload=none", *many)
    planned = plan(PUBLISHED["Qwen/Qwen2.5-Coder-3B"], plan_settings(stays))
    assert planned.while_sampling == ASSUMED_GPU_BYTES - CONTEXT_BYTES
    assert server_cache(stays) == planned.kv_cache > 0
    leaves = server_cache(served(company, "3B", "learner.offload=all", *many))
    assert leaves is not None
    assert leaves > planned.kv_cache


def test_a_server_that_sizes_its_cache_by_a_share_gets_what_the_learner_leaves(
    company: Path,
) -> None:
    sglang = ("engine.kind=sglang", "engine.memory_share=0.8")
    stays = served(company, "3B", *sglang, "learner.offload=none")
    planned = plan(PUBLISHED["Qwen/Qwen2.5-Coder-3B"], plan_settings(stays))
    taken = server_share(stays) * ASSUMED_GPU_BYTES + planned.engine_working + planned.state
    assert taken == pytest.approx(ASSUMED_GPU_BYTES - CONTEXT_BYTES)
    assert server_share(served(company, "3B", *sglang, "learner.offload=all")) == 0.8
    with pytest.raises(ConfigError, match=r"learner\.offload=all"):
        server_share(served(company, "7B", *sglang, "learner.offload=none"))


def test_a_learner_that_leaves_no_room_is_refused_with_its_remedy(company: Path) -> None:
    with pytest.raises(ConfigError, match=r"80\.00 GiB .* learner stay beside it: set learner\."):
        server_cache(served(company, "7B", "learner.offload=none"))
    assert server_cache(served(company, "7B", "learner.offload=all"))


def test_a_share_that_is_too_small_is_refused_whatever_the_learner_does(company: Path) -> None:
    settings = ("learner.offload=all", "engine.memory_share=0.2")
    with pytest.raises(ConfigError, match=r"memory_share=0\.2.*: set a larger engine\.memory_sh"):
        server_cache(served(company, "7B", *settings))


def test_an_unknown_model_has_no_planned_cache(company: Path) -> None:
    assert server_cache(company_recipe(company, *SERVED, "model.path=unknown")) is None
