"""Inside vLLM's workers: weights out of memory that this process and the learner's both see.

vLLM imports it by name, in whatever interpreter it runs, so that nothing of querl is imported here.
Its own transfer within one machine needs ray, which vLLM does not install, and reads pickles from
the network. Here an address and a table of contents travel as JSON, the numbers not at all.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import torch


class WeightLoader:
    """Methods that vLLM mixes into its worker class, to be called by ``/collective_rpc``."""

    def querl_begin(self: Any, address: str) -> None:
        """See the learner's buffer; from now on the weights are not whole."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.querl_buffer = see_buffer(json.loads(address), self.device)
        initialize_layerwise_reload(self.get_model())

    def querl_take(self: Any, contents: str) -> None:
        """Load what lies in the buffer; once this returns, it may be overwritten."""
        # vLLM keeps parts of a layer until the others have come: they may not lie in the buffer
        loaded = copied_tensors(self.querl_buffer, json.loads(contents), self.device)
        self.get_model().load_weights(loaded)
        torch.accelerator.synchronize()

    def querl_finish(self: Any) -> None:
        """The weights are whole; the buffer is let go, and what loading took."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.get_model(), self.model_config)
        torch.accelerator.synchronize()
        del self.querl_buffer
        torch.cuda.empty_cache()  # the cache wakes next, and vLLM itself does this only in sleep


def see_buffer(address: dict[str, Any], device: torch.device) -> torch.Tensor:
    """The bytes at an address that ``querl.rollout.transfer`` gave.

    Raises ValueError where they lie on another GPU than ``device``.
    """
    if "file" in address:
        return torch.from_file(
            address["file"], shared=True, size=address["num_bytes"], dtype=torch.uint8
        )
    own = str(torch.cuda.get_device_properties(device).uuid)
    if address["gpu"] != own:
        raise ValueError(f"the weights lie on GPU {address['gpu']}, and this worker is on {own}")
    storage = torch.UntypedStorage._new_shared_cuda(
        device.index,
        base64.b64decode(address["handle"]),
        address["storage_bytes"],
        address["offset"],
        base64.b64decode(address["counter"]),
        address["counter_offset"],
        base64.b64decode(address["event"]),
        address["needs_event"],
    )
    seen = torch.empty(0, dtype=torch.uint8, device=device)
    return seen.set_(storage)[: address["num_bytes"]]


def copied_tensors(
    buffer: torch.Tensor, contents: list[dict[str, Any]], device: torch.device
) -> list[tuple[str, torch.Tensor]]:
    """The tensors that lie in a buffer, copied to the device in one go."""
    last = contents[-1]
    end = last["start"] + math.prod(last["shape"]) * getattr(torch, last["dtype"]).itemsize
    bytes_ = buffer[:end].to(device, copy=True)
    found = []
    for entry in contents:
        dtype = getattr(torch, entry["dtype"])
        num_bytes = math.prod(entry["shape"]) * dtype.itemsize
        part = bytes_[entry["start"] : entry["start"] + num_bytes]
        found.append((entry["name"], part.view(dtype).view(entry["shape"])))
    return found
