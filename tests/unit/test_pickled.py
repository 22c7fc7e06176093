"""Tensors on their way to a server by handle."""

from __future__ import annotations

import pytest
import torch

from querl.errors import EngineError
from querl.rollout.pickled import reachable


def test_a_gpu_without_room_for_weights_of_the_host_is_an_engine_s_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(f"no room for {tensor.nbytes} bytes")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", full)
    with pytest.raises(EngineError, match=r"set a smaller engine\.memory_share"):
        reachable([("weight", torch.zeros(3))], shares_memory=True)
