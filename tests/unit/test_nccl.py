"""Weights by NCCL: whom the learner has met, as far as no GPU is needed to know."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from querl.errors import EngineError
from querl.rollout import nccl
from querl.rollout.http import Http
from querl.rollout.nccl import NcclSender

WEIGHTS = [("a", torch.zeros(2))]


class Answering(Http):
    """Says yes, until it ``is_broken``."""

    is_broken = False

    async def post(self, route: str, body: Any = None, **kwargs: Any) -> dict[str, Any]:
        if self.is_broken:
            raise EngineError("broken")
        return {}


class Meetings(NcclSender):
    """Writes down whom it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[Http] = []

    async def _join(self, http: Http, device: torch.device) -> object:
        self.met.append(http)
        return object()


@pytest.fixture
def sender(monkeypatch: pytest.MonkeyPatch) -> Meetings:
    monkeypatch.setattr(nccl, "_broadcast", lambda group, tensors, device: None)
    return Meetings()


def test_workers_are_met_once_and_those_of_a_server_started_anew_again(sender: Meetings) -> None:
    first, anew = Answering("http://nowhere"), Answering("http://nowhere")
    for http in (first, first, anew, anew):
        asyncio.run(sender.send(http, WEIGHTS))
    assert sender.met == [first, anew]


def test_workers_are_met_again_after_a_load_that_failed(sender: Meetings) -> None:
    http = Answering("http://nowhere")
    asyncio.run(sender.send(http, WEIGHTS))
    http.is_broken = True
    with pytest.raises(EngineError, match="broken"):
        asyncio.run(sender.send(http, WEIGHTS))
    http.is_broken = False
    asyncio.run(sender.send(http, WEIGHTS))
    assert sender.met == [http, http]
