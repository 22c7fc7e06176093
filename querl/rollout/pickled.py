"""Tensors as text for a server of another process: by handle on a GPU, by value elsewhere."""

from __future__ import annotations

import base64
import io
import json
import pickle
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import reduce_tensor

from querl.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

_DEVICE = 6  # the place of a GPU's number in what torch calls to open a handle


def buckets(
    tensors: Iterable[tuple[str, Tensor]], *, max_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Cut into lists of at most ``max_bytes``, or of one tensor that is larger."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def reachable(
    tensors: Iterable[tuple[str, Tensor]], *, shares_memory: bool
) -> list[tuple[str, Tensor]]:
    """Where handles to them can be given, or where they can be sent by value, if none can.

    Raises EngineError where they lie on the host and the GPU has no room for them.
    """
    if not shares_memory:
        return [(name, tensor.cpu()) for name, tensor in tensors]
    if not torch.cuda.is_available():
        return list(tensors)
    try:
        return [(name, tensor.cuda()) for name, tensor in tensors]
    except torch.OutOfMemoryError as error:
        raise EngineError(
            "the GPU has no room to hand the weights over: set a smaller engine.memory_share"
        ) from error


def pickled(value: object) -> str:
    """A pickle as base64. Tensors on a GPU must live until the server has answered.

    Each process that unpickles needs a text of its own: torch counts who has opened a handle.
    """
    text = io.BytesIO()
    _Handles(text, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return base64.b64encode(text.getbuffer()).decode()


def release_handles() -> None:
    """Free what was kept for a server until it closed its handles."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of an adapter as PEFT writes it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


class _Handles(pickle.Pickler):
    """Names GPUs by their ids: two processes may count them differently."""

    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        if obj.is_cuda:
            rebuild, arguments = reduce_tensor(obj)  # type: ignore[no-untyped-call]
            identity = str(torch.cuda.get_device_properties(obj.device).uuid)
            return rebuild, (*arguments[:_DEVICE], identity, *arguments[_DEVICE + 1 :])
        if obj.nbytes < obj.untyped_storage().nbytes():
            # a part, without the whole
            return obj.clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]
        return NotImplemented
