"""Rows that fit, the plan that a run prints, and an update measured against it."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from company import company_recipe, listener, make_company
from console import Querl

from querl.launch.memory import (
    HEADROOM,
    ROW_SIZES,
    GpuMeter,
    Memory,
    ProcessMeter,
    plan_memory,
    room_bytes,
    size_text,
    with_rows,
)
from querl.launch.needs import plan_settings
from querl.launch.training import train_locally
from querl.run import Run
from querl.trainer.plan import CONTEXT_BYTES, SERVER_BYTES, EnginePlan, PlanSettings, plan
from querl.trainer.shapes import PUBLISHED

GIB, MIB = 2**30, 2**20
QWEN_3B = PUBLISHED["Qwen/Qwen2.5-Coder-3B"]
ANY = PlanSettings(tokens_per_microbatch=0)


def rows_of_3b(settings: PlanSettings, room_gib: int) -> int:
    room = Memory(shape=QWEN_3B, settings=settings, longest=0, room=room_gib * GIB)
    return room.rows_that_fit()


@pytest.mark.parametrize("room_gib", [80, 96, 141])
def test_the_longest_rows_that_fit_are_taken(room_gib: int) -> None:
    chosen = rows_of_3b(ANY, room_gib)

    def update_bytes(num_tokens: int) -> int:
        planned = plan(QWEN_3B, replace(ANY, tokens_per_microbatch=num_tokens))
        return planned.state + planned.update

    fits = [n for n in ROW_SIZES if update_bytes(n) <= HEADROOM * room_gib * GIB]
    assert chosen == max(fits)


def test_more_room_recomputing_and_an_engine_elsewhere_make_rows_longer() -> None:
    small, large = (rows_of_3b(ANY, size) for size in (64, 141))
    assert small < large
    recomputed = replace(ANY, is_recomputed=True)
    assert rows_of_3b(recomputed, 64) > small
    engine = EnginePlan(has_own_weights=True, num_sequences=64, context=8000, is_beside=True)
    assert rows_of_3b(replace(ANY, engine=engine), 141) < large


def test_where_nothing_fits_rows_are_the_shortest() -> None:
    assert rows_of_3b(ANY, 1) == min(ROW_SIZES)


def test_a_length_that_a_recipe_names_stays(tmp_path: Path) -> None:
    company = make_company(tmp_path)
    named = company_recipe(company, "memory.tokens_per_microbatch=777")
    assert with_rows(named) is named
    chosen = with_rows(company_recipe(company, "memory.tokens_per_microbatch=0"))
    assert chosen.memory.tokens_per_microbatch == max(ROW_SIZES)  # of so small a model
    unknown = company_recipe(company, "memory.tokens_per_microbatch=0", "model.path=unknown")
    assert plan_memory(unknown) is None
    assert with_rows(unknown).memory.tokens_per_microbatch == 8192


def test_the_room_beside_a_server_is_the_same_however_far_its_start_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    company = make_company(tmp_path)
    free = 70 * GIB
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 4 * GIB)
    served = company_recipe(company, "engine.kind=vllm", "engine.placement=colocated")
    alone = company_recipe(company, "model.device=cuda")
    before = room_bytes(served), room_bytes(alone)
    free = 10 * GIB
    assert room_bytes(served) == before[0] == 80 * GIB - SERVER_BYTES - CONTEXT_BYTES
    assert (before[1], room_bytes(alone)) == (74 * GIB, 14 * GIB)


@pytest.mark.parametrize(
    ("capability", "prefix", "keys"),
    # a prompt of 1,500 tokens and four answers of 556
    [
        ((7, 5), "true", (1500 + 4 * 2056) / (1500 + 4 * 556)),
        ((7, 5), "false", 1),
        ((8, 0), "true", 0),
    ],
)
def test_keys_are_gathered_where_no_fused_kernel_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    prefix: str,
    keys: float,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    gpu = SimpleNamespace(total_memory=15 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    lengths = ("env.max_prompt=1500", "env.max_input=1800", "env.max_turn_tokens=256")
    recipe = company_recipe(
        make_company(tmp_path),
        *lengths,
        "env.max_turns=2",
        "run.group_size=4",
        "model.device=cuda",
        f"memory.share_prefix={prefix}",
    )
    assert plan_settings(recipe).gathered_keys == keys


def test_a_run_prints_its_plan_first_and_an_update_measured_against_it(tmp_path: Path) -> None:
    company = make_company(tmp_path / "company")
    recipe = company_recipe(company, "run.num_steps=3", "memory.tokens_per_microbatch=0")
    heard = listener()
    with Run(tmp_path / "run", recipe, heard, fresh=False) as run:
        asyncio.run(train_locally(recipe, run, heard.say))
    table = next(text for text in heard.said if text.startswith("memory plan"))
    lines = table.splitlines()
    assert lines[0] == f"memory plan, rows of {max(ROW_SIZES):,} tokens:"
    memory = plan_memory(with_rows(recipe))
    assert memory is not None
    assert [line.rsplit(maxsplit=2)[0].strip() for line in lines[1:]] == [
        *(part for part, _ in memory.plan.lines()),
        "while updating",
        "while sampling",
        "at most",
    ]
    assert lines[-1].split() == ["at", "most", *size_text(memory.plan.peak).split()]
    told = [text for text in heard.said if text.startswith("memory: the process has grown by")]
    assert len(told) == (1 if sys.platform == "linux" else 0)


def test_a_longer_trajectory_than_a_row_is_told(tmp_path: Path) -> None:
    recipe = company_recipe(make_company(tmp_path), "env.max_input=29000")
    memory = plan_memory(recipe)
    assert memory is not None
    assert memory.table().splitlines()[-1] == (
        f"  a trajectory of 29,006 tokens would be a longer row: "
        f"{size_text(memory.of_rows(29_006).peak)}"
    )


def test_a_trajectory_that_fits_nowhere_is_warned_of_with_its_remedies(tmp_path: Path) -> None:
    company = make_company(tmp_path)
    for keeps, remedies in (
        (True, "set a smaller env.max_input, or memory.checkpoint_activations"),
        (False, "set a smaller env.max_input"),
    ):
        recompute = f"memory.checkpoint_activations={str(not keeps).lower()}"
        memory = plan_memory(company_recipe(company, "env.max_input=1_000_000_000", recompute))
        assert memory is not None
        last = memory.table().splitlines()[-1]
        assert last.startswith("  warning: a trajectory of 1,000,000,006 tokens would be a longer")
        assert last.endswith(f"more than the {size_text(memory.room)} here; {remedies}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_processs_peak_is_what_it_grew_by_though_it_was_freed() -> None:
    meter = ProcessMeter(has_moments=False)
    assert meter.start()
    torch.ones(75 * MIB)  # float32, and gone at once
    assert meter.peak() == pytest.approx(300 * MIB, rel=0.1)
    assert meter.start()
    assert meter.peak() < 30 * MIB


def test_a_plan_is_called_wrong_beyond_a_tenth() -> None:
    gpu = GpuMeter(torch.device("cuda"))
    far = [gpu.is_far(measured * GIB, 100 * GIB) for measured in (85, 95, 105, 115)]
    assert far == [True, False, False, True]
    process = ProcessMeter(has_moments=True)
    assert not process.is_far(100 * MIB, 1000 * MIB)  # it reuses what it freed
    assert not process.is_far(1200 * MIB, 1000 * MIB)  # less than comes and goes
    assert process.is_far(1300 * MIB, 1000 * MIB)


def test_doctor_plans_rows_that_fit(querl: Querl, tmp_path: Path) -> None:
    recipe = make_company(tmp_path) / "recipe.toml"
    shown = [
        querl("doctor", recipe, f"memory.tokens_per_microbatch={number}")[1]
        for number in (0, max(ROW_SIZES))
    ]
    assert shown[0] == shown[1]
    assert "activations" in shown[0]
