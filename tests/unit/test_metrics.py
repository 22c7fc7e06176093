from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

import querl
from querl.metrics import JsonlSink, Max, Mean, Metrics, Sum


def test_each_reduction_survives_a_merge_of_unequal_parts() -> None:
    left, right = Metrics(), Metrics()
    left.add_mean("m", total=9.0, count=3)
    right.add_mean("m", total=1.0, count=1)
    for metrics, number in ((left, 2.0), (right, 5.0)):
        metrics.add_max("largest", number)
        metrics.add_sum("total", number)
    left.add(right)
    assert left.values() == {"largest": 5.0, "m": 2.5, "total": 7.0}


def test_a_mean_of_nothing_is_not_a_number() -> None:
    assert math.isnan(Mean(0.0, 0).value)


def test_two_kinds_under_one_name_are_refused() -> None:
    for one, other in ((Mean(1.0), Max(1.0)), (Max(1.0), Sum(1.0)), (Sum(1.0), Mean(1.0))):
        with pytest.raises(TypeError, match="cannot merge"):
            one.merge(other)


def test_the_name_that_the_docstring_gives_is_one_that_is_written() -> None:
    texts = [path.read_text() for path in Path(querl.__file__).parent.rglob("*.py")]
    # the first is the form of names, the second that of a timer's
    _, _, name = re.findall(r"``(\w+/\w+)``", Metrics.__doc__ or "")
    assert any(f'"{name}"' in text for text in texts), name


def test_a_timer_adds_up_over_blocks() -> None:
    metrics = Metrics()
    for _ in range(2):
        with metrics.time("update"):
            pass
    assert "time/update_s" in metrics
    assert metrics["time/update_s"] >= 0


def test_the_file_keeps_lines_up_to_a_step_and_writes_no_nan(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    assert sink.read() == []
    sink.truncate_after(0)
    for step in (1, 2, 3):
        sink.write(step, {"x": step / 2, "bad": math.nan})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x": 1')  # a line that a kill cut short
    sink.truncate_after(2)
    assert sink.read() == [
        {"step": 1, "x": 0.5, "bad": None},
        {"step": 2, "x": 1.0, "bad": None},
    ]
