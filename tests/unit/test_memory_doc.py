"""docs/memory.md says what the plan says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from querl.config import known_keys
from querl.trainer.plan import EIGHT_BIT_MOMENTS, Adapter, EnginePlan, PlanSettings, plan
from querl.trainer.shapes import PUBLISHED

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
SHAPES = [PUBLISHED[f"Qwen/Qwen2.5-Coder-{size}"] for size in ("3B", "7B", "14B", "32B")]
ROWS = PlanSettings(tokens_per_microbatch=16_384, is_recomputed=True)
SETTINGS = {
    "all weights": ROWS,
    "moments in 8 bits": replace(ROWS, moment_bytes=EIGHT_BIT_MOMENTS),
    "and no masters": replace(ROWS, moment_bytes=EIGHT_BIT_MOMENTS, has_masters=False),
    "state on the host": replace(ROWS, offload="optimizer"),
    "LoRA": replace(ROWS, adapter=Adapter(rank=32)),
    "QLoRA": replace(ROWS, adapter=Adapter(rank=32, is_quantised=True)),
}


def table() -> dict[str, list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: rest for name, *rest in cells if name}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_table_holds_the_plans_peaks(name: str) -> None:
    told = [int(cell) for cell in table()[name][:4]]
    planned = [plan(shape, SETTINGS[name]).peak / 2**30 for shape in SHAPES]
    assert told == pytest.approx(planned, abs=0.51)


def test_every_line_of_the_table_is_checked_and_names_a_key() -> None:
    assert table().keys() == SETTINGS.keys()
    keys = [row[4].strip("`").split("`")[0].split(" = ")[0] for row in table().values()]
    assert set(keys[1:]) <= set(known_keys())


def test_the_host_and_the_t4_are_told_right() -> None:
    text = PAGE.read_text(encoding="utf-8")
    host = [round(plan(shape, SETTINGS["state on the host"]).offloaded / 2**30) for shape in SHAPES]
    assert "holds {}, {}, {} and {} GiB".format(*host) in text
    rooms = []
    for has_reference in (False, True):
        leaving = replace(ROWS, offload="all", has_reference=has_reference)
        rooms.append(round(plan(SHAPES[1], leaving).state / 2**30))
    assert rooms == [14, 28]
    assert "makes 14 GiB of room so, 28\nwhere it has a reference" in text
    t4 = PlanSettings(
        tokens_per_microbatch=1500 + 4 * 256,
        is_recomputed=True,
        adapter=Adapter(rank=16, is_quantised=True, is_anchored=True),
        gathered_keys=(1500 + 4 * 1756) / (1500 + 4 * 256),
        engine=EnginePlan(num_sequences=4, context=1756, num_kept=4),
    )
    assert f"peak is {plan(SHAPES[0], t4).peak / 2**30:.1f} GiB" in text
