"""vLLM's routes: a server of ours or elsewhere. Read against its version 0.26."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from querl.errors import EngineError
from querl.rollout import worker
from querl.rollout.dialect import Piece
from querl.rollout.flags import as_arguments
from querl.rollout.http import Refused
from querl.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from querl.rollout.dialect import Weights
    from querl.rollout.engine import Sampling
    from querl.rollout.http import Http
    from querl.rollout.nccl import NcclSender
    from querl.rollout.transfer import SharedBuffer

CONTROL_S = 120.0  # to pause, to sleep, to load a part
ALIVE_S = 20.0  # to say so
LEAST_SHARE = 0.01
OWN_GRAPHS = 512  # tokens of a batch up to which vLLM captures CUDA graphs by itself
ADAPTER_BYTES = 2**32  # more than an adapter takes
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM takes no others as a largest rank
LEAST_LOGPROB = -9999.0  # what vLLM writes for a token that it has no number of


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """What a vLLM server is started with, and what requests must know of it.

    ``context`` counts tokens of prompt and completion. ``memory_share`` is of the whole GPU:
    weights and cache; ``cache_bytes`` are of the cache, where vLLM shall not measure what is free.
    ``rank`` > 0 serves an adapter of at most that rank; ``frontends`` > 1 serve none. ``end_ids``
    end a completion beside those that the model's folder names. ``sleeps`` where the learner
    computes on the same GPUs. ``options`` are flags by their names, and win over ours; False leaves
    one out. A server that is elsewhere reads adapters from ``adapter_folder``, which both of us
    must see.
    """

    model: str
    dtype: str
    context: int
    quantisation: str | None = None
    memory_share: float = 0.8
    cache_bytes: int | None = None
    max_batch: int = 256
    tensor_parallel: int = 1
    frontends: int = 1
    rank: int = 0
    end_ids: tuple[int, ...] = ()
    seed: int = 0
    sleeps: bool = True
    is_elsewhere: bool = False
    adapter_folder: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Vllm:
    """Implements ``querl.rollout.dialect.Dialect`` for vLLM.

    Weights go into the workers of a server of ours by ``worker/querl_vllm.py``, and into those of
    one elsewhere by NCCL. Weights that sleep are lost where no adapter is trained: load them before
    sampling.
    """

    name = "vllm"

    def __init__(self, settings: VllmSettings) -> None:
        self._settings = settings
        self._end_ids = sorted({*settings.end_ids, *named_end_ids(Path(settings.model))})
        self._sender: NcclSender | None = None  # to a server elsewhere, from the first load on
        self._adapter: str | None = None
        self._num_adapters = 0

    def command(self, *, python: str, port: int) -> Sequence[str]:
        """The command that starts such a server on 127.0.0.1."""
        ours = self._settings
        flags: dict[str, Any] = {
            "model": ours.model,
            "host": "127.0.0.1",
            "port": port,
            "dtype": ours.dtype,
            "quantization": ours.quantisation,
            "max_model_len": ours.context,
            # it must be free when the server starts, also where nothing is measured by it
            "gpu_memory_utilization": ours.memory_share
            if ours.cache_bytes is None
            else LEAST_SHARE,
            "kv_cache_memory_bytes": ours.cache_bytes,
            "max_num_seqs": ours.max_batch,
            "tensor_parallel_size": ours.tensor_parallel,
            "api_server_count": ours.frontends if ours.frontends > 1 else None,
            "cudagraph_capture_sizes": _graph_sizes(ours),
            "seed": ours.seed,
            "enable_prefix_caching": True,
            "enable_sleep_mode": ours.sleeps,
            # the others are of the logits before temperature and top-p
            "logprobs_mode": "processed_logprobs",
            # or the model's folder sets a temperature, top-k or penalties
            "generation_config": "vllm",
            "worker_extension_cls": "querl_vllm.WeightLoader",
            "disable_log_stats": True,
            "disable_uvicorn_access_log": True,
            "uvicorn_log_level": "warning",
            **(self._adapter_flags() if ours.rank else {}),
            **ours.options,
        }
        # the entry that starts several frontends; they share its port
        several = ("vllm.entrypoints.cli.main", "serve")
        entry = several if ours.frontends > 1 else ("vllm.entrypoints.openai.api_server",)
        return [python, "-m", *entry, *as_arguments(flags)]

    def _adapter_flags(self) -> dict[str, Any]:
        rank = next((rank for rank in LORA_RANKS if rank >= self._settings.rank), None)
        if rank is None:
            raise EngineError(
                f"lora.rank={self._settings.rank}: vllm serves adapters up to {LORA_RANKS[-1]}: "
                "set a smaller lora.rank"
            )
        # one adapter at a time: the next one put in drives the last one out
        return {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}

    def environment(self) -> Mapping[str, str]:
        """What that command needs beside this process's own environment."""
        found = os.environ.get("PYTHONPATH")
        folder = str(Path(worker.__file__).parent)
        return {
            "PYTHONPATH": folder if not found else os.pathsep.join([folder, found]),
            # the routes to pause, sleep and load, which are no others' on 127.0.0.1
            "VLLM_SERVER_DEV_MODE": "1",
            # several frontends refuse it, even without an adapter
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1" if self._settings.rank else "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_API_KEY": "",  # of servers elsewhere: ours would ask for it, too
            # this one's kernels would be compiled when the server starts
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # a learner's own choice, which sleeping weights cannot live with
            "PYTORCH_CUDA_ALLOC_CONF": "",
            "PYTORCH_ALLOC_CONF": "",
        }

    async def is_ready(self, http: Http) -> bool:
        """Whether it takes requests; False while it is starting."""
        await http.get("/health", timeout_s=30.0)
        return True

    def request(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int
    ) -> tuple[str, dict[str, Any]]:
        """Route and body of one completion, which the server's context bounds."""
        body: dict[str, Any] = {
            "token_ids": list(prompt_ids),
            "sampling_params": {
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": seed % 2**63,
                "stop": list(sampling.stop),
                "stop_token_ids": self._end_ids,
                # there are no others then: what ended a completion is seen from its last token
                "ignore_eos": True,
                "logprobs": 0,  # of the sampled token alone
                **_UNTOUCHED,
            },
        }
        if self._adapter is not None:
            body["model"] = self._adapter
        return "/inference/v1/generate", body

    def piece(self, answer: Mapping[str, Any]) -> Piece:
        """What the server's answer to ``request`` says. Raises EngineError for broken numbers."""
        (choice,) = answer["choices"]
        token_ids = tuple(choice["token_ids"])
        logprobs = tuple(token["logprob"] for token in choice["logprobs"]["content"])
        if len(token_ids) != len(logprobs) or any(x <= LEAST_LOGPROB for x in logprobs):
            raise EngineError("vllm: tokens without log-probabilities: the weights are broken")
        return Piece(
            token_ids=token_ids,
            logprobs=tuple(min(0.0, logprob) for logprob in logprobs),
            finish=self._finish(choice["finish_reason"], token_ids),
        )

    def _finish(self, reason: str, token_ids: Sequence[int]) -> FinishReason | None:
        if reason not in _FINISH:
            raise EngineError(f"vllm: a completion ended by {reason!r}: see the server's log")
        ended_by_token = reason == "stop" and token_ids[-1] in self._end_ids
        return FinishReason.END if ended_by_token else _FINISH[reason]

    async def check_alive(self, http: Http, *, timeout_s: float) -> None:
        """Ask its workers. Raises Overdue where they are frozen; /health would not tell."""
        await http.post("/collective_rpc", {"method": "check_health"}, timeout_s=timeout_s)

    async def pause(self, http: Http) -> None:
        """Cut what runs: each open request is answered with what it has; new ones wait."""
        await _control(http, "/pause", params={"mode": "abort"})

    async def resume(self, http: Http) -> None:
        """Go on after ``pause``."""
        await _control(http, "/resume")

    async def sleep(self, http: Http, *, keeps_weights: bool) -> None:
        """Give the GPU's memory back; paused. The base of an adapter is kept in host memory."""
        # level 2 brings a model's buffers back by itself, but no weights
        if self._settings.sleeps:
            level = "1" if keeps_weights else "2"
            await _control(http, "/sleep", params={"level": level})

    async def wake_weights(self, http: Http) -> None:
        """Take the weights' memory again, so that they can be loaded."""
        await self._wake(http, "weights")

    async def wake_cache(self, http: Http) -> None:
        """Take the memory of the key-value cache again. Fully awake, vLLM goes on by itself."""
        await self._wake(http, "kv_cache")

    async def _wake(self, http: Http, tag: str) -> None:
        if self._settings.sleeps:
            # a frozen server is found out before it is given the time that waking may take
            await self.check_alive(http, timeout_s=ALIVE_S)
            await _control(http, "/wake_up", params={"tags": tag})

    async def load(self, http: Http, weights: Weights) -> None:
        """Load weights or adapter, and forget every cached prefix. Paused, weights awake."""
        if weights.is_adapter:
            await self._load_adapter(http, weights)
        else:
            await self._load_all(http, weights)
        forgot = await _control(http, "/reset_prefix_cache")
        if forgot.get("success") is not True:
            raise EngineError("vllm kept what it had computed with the old weights: see its log")

    async def _load_all(self, http: Http, weights: Weights) -> None:
        from querl.rollout.transfer import buffer_bytes, gpu_buffer, host_buffer

        tensors = await asyncio.to_thread(lambda: list(weights.tensors()))
        if self._settings.is_elsewhere:
            from querl.rollout.nccl import NcclSender

            self._sender = self._sender or NcclSender()
            await self._sender.send(http, tensors)
            return
        num_bytes, device = buffer_bytes(tensors), tensors[0][1].device
        # of several GPUs, most could not see this one's memory
        if device.type == "cuda" and self._settings.sleeps and self._settings.tensor_parallel == 1:
            with gpu_buffer(num_bytes, device) as buffer:
                await _hand_over(http, buffer, tensors)
        else:
            with host_buffer(num_bytes) as buffer:
                await _hand_over(http, buffer, tensors)

    async def _load_adapter(self, http: Http, weights: Weights) -> None:
        from safetensors import SafetensorError

        from querl.rollout.transfer import memory_folder

        # A name of its own for each. Loaded in place, under the old name, an adapter is read from
        # its files again before each token; and no cached prefix of it was another adapter's.
        self._num_adapters += 1
        name = f"querl-{self._num_adapters}"
        place = self._settings.adapter_folder or memory_folder(ADAPTER_BYTES)
        try:
            with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=place) as folder:
                await asyncio.to_thread(weights.save_adapter, Path(folder))
                if self._settings.is_elsewhere:
                    Path(folder).chmod(0o755)  # for a server that another user runs
                body = {"lora_name": name, "lora_path": folder}
                await _control(http, "/v1/load_lora_adapter", body)
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"the adapter for vllm could not be written to {place}: {error}: make room there"
            ) from error
        self._adapter = name


def _graph_sizes(settings: VllmSettings) -> list[int] | None:
    """Batches to capture, where vLLM's own are too few: a larger one launches kernel by kernel.

    A batch has a token for each request that decodes, and those of the prompts that are read
    beside them. Up to 512 these are vLLM's own sizes.
    """
    num_seats = settings.max_batch
    named = {name.replace("-", "_") for name in settings.options}
    if 2 * num_seats <= OWN_GRAPHS or named & {"compilation_config", "max_cudagraph_capture_size"}:
        return None
    fine = {1, 2, 4, *range(8, 256, 8), *range(256, OWN_GRAPHS, 16)}
    return sorted({*fine, num_seats, *range(OWN_GRAPHS, 2 * num_seats + 1, 64)})


def named_end_ids(folder: Path) -> frozenset[int]:
    """The end tokens that a folder names for its model and its tokenizer."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        named = _read(folder / name).get("eos_token_id")
        found.update(named if isinstance(named, list) else [] if named is None else [named])
    end = _read(folder / "tokenizer_config.json").get("eos_token")
    text = end["content"] if isinstance(end, dict) else end
    added = _read(folder / "tokenizer.json").get("added_tokens", [])
    found.update(token["id"] for token in added if token["content"] == text)
    return frozenset(found)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


async def _hand_over(
    http: Http, buffer: SharedBuffer, tensors: Sequence[tuple[str, Tensor]]
) -> None:
    await _in_workers(http, "querl_begin", buffer.address)
    buffer.hide()
    filled = buffer.fill(tensors)
    while (contents := await asyncio.to_thread(next, filled, None)) is not None:
        await _in_workers(http, "querl_take", contents)
    await _in_workers(http, "querl_finish")


async def _in_workers(http: Http, method: str, *args: str) -> None:
    await _control(http, "/collective_rpc", {"method": method, "args": list(args)})


async def _control(
    http: Http, route: str, body: Any = None, *, params: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Routes that a server has only where it was started for them. Raises EngineError."""
    try:
        return await http.post(route, body, params=params, timeout_s=CONTROL_S)
    except Refused as error:
        if error.status != 404:
            raise
        raise EngineError(
            f"{error}: start a vllm server that is to be trained with VLLM_SERVER_DEV_MODE=1, "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and "
            """--weight-transfer-config '{"backend": "nccl"}', where it sees our adapters"""
        ) from error


_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": None}
# what would make the distribution another one, or its text another than a tokenizer decodes
_UNTOUCHED = {
    "n": 1,
    "top_k": 0,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "output_kind": 2,  # one output, at the end
}
