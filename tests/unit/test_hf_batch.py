"""The key-value buffer of a static batch: it grows without being held twice."""

from __future__ import annotations

import sys

import pytest
import torch

from querl.launch.memory import ProcessMeter
from querl.rollout.hf_batch import GROWTH, Buffer

MIB = 2**20


def buffer(num_layers: int, *, num_columns: int, rows: int = 1, size: int = 64) -> Buffer:
    shape = (2, rows, 1, num_columns, size)
    return Buffer([torch.randn(shape) for _ in range(num_layers)], num_columns)


def test_a_buffer_that_grows_keeps_what_it_has_and_its_new_columns_are_zero() -> None:
    grown = buffer(3, num_columns=5, rows=2)
    before = [layer.clone() for layer in grown.layers]
    grown.grow()
    assert grown.num_columns == 5 + GROWTH
    for old, new in zip(before, grown.layers, strict=True):
        assert new[..., :5, :].equal(old)
        assert not new[..., 5:, :].any()


def test_rows_are_filled_with_what_others_hold() -> None:
    filled = buffer(2, num_columns=5, rows=4)
    filled.width = 3
    before = [layer.clone() for layer in filled.layers]
    filled.copy_rows([1, 0], slice(2, None))
    for old, new in zip(before, filled.layers, strict=True):
        assert new[:, 2:, :, :3].equal(old[:, [1, 0], :, :3])
        assert new[:, 2:, :, 3:].equal(old[:, 2:, :, 3:])
        assert new[:, :2].equal(old[:, :2])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_buffer_that_grows_is_held_twice_in_one_layer_only() -> None:
    # layers larger than what malloc keeps for itself when it is freed
    grown = buffer(8, num_columns=40 * MIB // 512)
    meter = ProcessMeter(has_moments=True)
    assert meter.start()
    grown.grow()
    assert 30 * MIB < meter.peak() < 80 * MIB
