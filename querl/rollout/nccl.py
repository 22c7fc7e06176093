"""Weights to a vLLM server on other GPUs or another machine, by NCCL and vLLM's own package."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from querl.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from querl.rollout.http import Http

JOIN_S = 120.0
SEND_S = 300.0


class NcclSender:
    """Meets the server's workers at the first load, and again after one that failed.

    A server that was started anew, which is spoken to by another ``Http``, has not met us either.
    Raises EngineError where vLLM cannot be imported: its workers speak to itself alone.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._http: Http | None = None  # to the server whose workers are in it

    async def send(self, http: Http, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Load all of them into a paused server."""
        device = next((t.device for _, t in tensors if t.is_cuda), torch.device("cuda", 0))
        has_met = self._group is not None and self._http is http
        group = self._group if has_met else await self._join(http, device)
        self._group, self._http = None, http  # a transfer that fails leaves it unusable
        contents = {
            "names": [name for name, _ in tensors],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "packed": True,
        }
        await http.post("/start_weight_update")
        await asyncio.gather(
            http.post("/update_weights", {"update_info": contents}, timeout_s=SEND_S),
            _beside(lambda: _broadcast(group, tensors, device), timeout_s=SEND_S),
        )
        await http.post("/finish_weight_update", timeout_s=SEND_S)
        self._group = group

    async def _join(self, http: Http, device: torch.device) -> Any:
        engine = _vllm().NCCLWeightTransferEngine

        def meet() -> Any:
            torch.cuda.set_device(device)  # of this thread; it becomes the group's
            return engine.trainer_init(meeting)

        num_workers = (await http.get("/get_world_size"))["world_size"]
        meeting = {
            "master_address": _own_address(http.url),
            "master_port": _free_port(),
            "world_size": num_workers + 1,
        }
        # we are the first of the group
        init_info = {**meeting, "rank_offset": 1}
        _, group = await asyncio.gather(
            http.post("/init_weight_transfer_engine", {"init_info": init_info}, timeout_s=JOIN_S),
            _beside(meet, timeout_s=JOIN_S),
        )
        return group


def _broadcast(group: Any, tensors: Sequence[tuple[str, Tensor]], device: torch.device) -> None:
    torch.cuda.set_device(device)
    torch.cuda.synchronize()  # it sends on streams of its own
    sender = _vllm()
    arguments = sender.NCCLTrainerSendWeightsArgs(
        group=group, packed=True, post_iter_func=lambda named: named[1].to(device)
    )
    sender.NCCLWeightTransferEngine.trainer_send_weights(iter(tensors), arguments)
    torch.cuda.synchronize()


def _vllm() -> Any:
    try:
        from vllm.distributed.weight_transfer import nccl_engine
    except ImportError as error:
        raise EngineError(
            f"weights reach a vllm server at engine.url by vllm's own package ({error}): "
            "pip install 'querl[vllm]', or train an adapter by lora.rank"
        ) from error
    return nccl_engine


async def _beside(work: Callable[[], Any], *, timeout_s: float) -> Any:
    """Do it in a thread that nobody waits for at the end: NCCL waits for ever for who is gone."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def settle(result: Any, failure: EngineError | None) -> None:
        if done.done():
            return
        if failure is None:
            done.set_result(result)
        else:
            done.set_exception(failure)

    def run() -> None:
        try:
            result = work()
        except (RuntimeError, OSError) as error:
            failure = EngineError(f"the weights did not reach the vllm server: {error}")
            loop.call_soon_threadsafe(settle, None, failure)
        else:
            loop.call_soon_threadsafe(settle, result, None)

    threading.Thread(target=run, daemon=True, name="querl-nccl").start()
    try:
        return await asyncio.wait_for(done, timeout_s)
    except TimeoutError as error:
        raise EngineError(f"the vllm server did not meet us in {timeout_s:g} s") from error


def _own_address(url: str) -> str:
    """Ours, as the server sees it. Nothing is sent."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        address: str = probe.getsockname()[0]
        return address


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
