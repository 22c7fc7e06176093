"""examples/pipeline_check.py: what a person sees who runs it."""

from __future__ import annotations

import re

import pytest

from examples import pipeline_check


@pytest.mark.slow
def test_the_pipeline_check_pays_three_answers_trains_and_answers_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline_check.main()
    out = capsys.readouterr().out
    # right 1 + tags 0.2; valid 0.1 + 0.2, none of the gold's names; invalid -0.5 + 0.2
    assert out.startswith("right: +1.20\nvalid, but wrong: +0.30\ninvalid: -0.30\n")
    steps = re.findall(r"^step (\d): .* (\d+) tokens trained, gradient norm (.+)$", out, re.M)
    assert [step for step, _, _ in steps] == ["1", "2", "3"]
    assert any(int(tokens) and float(norm) > 0 for _, tokens, norm in steps)
    for part in ("before:", "after:"):
        shown = out[out.index(part) :]
        assert all(question in shown for question in pipeline_check.GOLDS)
