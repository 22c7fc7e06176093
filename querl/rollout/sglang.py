"""SGLang's routes: a server of ours or elsewhere. Read against its versions 0.5.11 to 0.5.17."""

from __future__ import annotations

import asyncio
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from querl.errors import ConfigError, EngineError
from querl.rollout.dialect import Piece
from querl.rollout.flags import as_arguments
from querl.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from querl.rollout.dialect import Weights
    from querl.rollout.engine import Sampling
    from querl.rollout.http import Http

# of a decoder, but for its head
EVERY_MATRIX = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BUCKET_BYTES = 2**30  # of weights in one call
IDLE_S = 30.0  # for what was cut to leave the scheduler
LOAD_S = 120.0
MEMORY_S = 120.0
OWN_GRAPHS = 256  # requests of a batch up to which SGLang captures CUDA graphs by itself
# An adapter whose request was hung up on counts as in use for ever (0.5.17), and the next load
# waits for it if it must go. So many may stay in the host's memory.
NUM_ADAPTERS = 16
SPARE = 8  # tokens of its context that no prompt and no completion may take (it leaves 2 to 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangSettings:
    """What an SGLang server is started with, and what requests must know of it.

    ``context`` counts tokens of prompt and completion. ``memory_share`` is of what is free on the
    GPU when the server starts: weights and cache. ``rank`` > 0 serves an adapter of at most that
    rank, on the layers that ``targets`` names. ``end_ids`` end a completion beside the model's own.
    ``sleeps`` where the learner computes on the same GPUs. A server of the same machine, which
    ``shares_memory``, reads weights where they lie; others get them in the request. ``options`` are
    flags by their names, and win over ours; False leaves one out.
    """

    model: str
    dtype: str
    context: int
    quantisation: str | None = None
    memory_share: float = 0.8
    max_batch: int = 256
    tensor_parallel: int = 1
    rank: int = 0
    targets: tuple[str, ...] = EVERY_MATRIX
    end_ids: tuple[int, ...] = ()
    seed: int = 0
    sleeps: bool = True
    shares_memory: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


class Sglang:
    """Implements ``querl.rollout.dialect.Dialect`` for SGLang.

    Its samples follow a request's seed only with the option ``enable_deterministic_inference``,
    which is slower. Its log-probs know of the temperature and not of top-p, so that top-p is
    refused.
    """

    name = "sglang"

    def __init__(self, settings: SglangSettings) -> None:
        self._settings = settings
        self._adapter: str | None = None
        self._num_adapters = 0
        self._gave_weights = False

    @property
    def _is_backed_up(self) -> bool:
        return self._settings.rank > 0 and self._settings.sleeps

    def command(self, *, python: str, port: int) -> Sequence[str]:
        """The command that starts such a server on 127.0.0.1."""
        ours = self._settings
        flags: dict[str, Any] = {
            "model_path": ours.model,
            "host": "127.0.0.1",
            "port": port,
            "dtype": ours.dtype,
            "quantization": ours.quantisation,
            "context_length": ours.context + SPARE,
            "mem_fraction_static": ours.memory_share,
            "max_running_requests": ours.max_batch,
            # beyond its own, which fit the GPU, batches launch kernel by kernel
            "cuda_graph_max_bs": ours.max_batch if ours.max_batch > OWN_GRAPHS else None,
            "tp_size": ours.tensor_parallel,
            "random_seed": ours.seed,
            "log_level": "warning",
            "enable_memory_saver": ours.sleeps,
            # the kernels that other choices take are large, and built apart
            "attention_backend": "triton",
            "sampling_backend": "pytorch",
            # copied at each sleep: an adapter's base is never loaded again
            "enable_weights_cpu_backup": self._is_backed_up,
            **(self._adapter_flags() if ours.rank else {}),
            **ours.options,
        }
        return [python, "-m", "sglang.launch_server", *as_arguments(flags)]

    def _adapter_flags(self) -> dict[str, Any]:
        return {
            "enable_lora": True,
            "max_lora_rank": self._settings.rank,
            "lora_target_modules": list(self._settings.targets),
            "max_loras_per_batch": 1,
            "max_loaded_loras": NUM_ADAPTERS,
        }

    def environment(self) -> Mapping[str, str]:
        """What that command needs beside this process's own environment."""
        return {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # a learner's own choice, which weights that are given back cannot live with
            "PYTORCH_CUDA_ALLOC_CONF": "",
            "PYTORCH_ALLOC_CONF": "",
            # of a context that is the model's whole, no token lies in what is spare
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
            # or each question about its health samples a token and takes a second
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
        }

    async def is_ready(self, http: Http) -> bool:
        """Whether it takes requests; False while it is starting."""
        await http.get("/health")
        return True

    def request(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int
    ) -> tuple[str, dict[str, Any]]:
        """Route and body of one completion. Raises ConfigError for top-p."""
        if sampling.top_p < 1.0 and sampling.temperature > 0.0:
            raise ConfigError(
                f"engine.top_p={sampling.top_p:g}: sglang gives no log-probabilities of what top-p "
                "leaves over: set engine.top_p = 1, or engine.kind = 'vllm'"
            )
        body: dict[str, Any] = {
            "input_ids": list(prompt_ids),
            "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "stop": list(sampling.stop),
                "no_stop_trim": True,
                "stop_token_ids": list(self._settings.end_ids),
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
                "sampling_seed": seed % 2**63,
                **_UNTOUCHED,
            },
        }
        if self._adapter is not None:
            body["lora_path"] = self._adapter
        return "/generate", body

    def piece(self, answer: Mapping[str, Any]) -> Piece:
        """What the server's answer to ``request`` says. Raises EngineError for broken numbers."""
        told = answer["meta_info"]
        # a request that was cut while it waited has sampled nothing
        sampled = told.get("output_token_logprobs") or []
        if any(logprob is None for logprob, *_ in sampled):
            raise EngineError("sglang: log-probabilities are not numbers: the weights are broken")
        return Piece(
            token_ids=tuple(token_id for _, token_id, *_ in sampled),
            logprobs=tuple(min(0.0, logprob) for logprob, *_ in sampled),
            finish=_finish(told["finish_reason"]),
        )

    async def check_alive(self, http: Http, *, timeout_s: float) -> None:
        """Ask its scheduler. Raises Overdue where that is frozen; /health would not tell."""
        await http.get("/server_info", timeout_s=timeout_s)

    async def pause(self, http: Http) -> None:
        """Cut what runs: each open request is answered with what it has; new ones wait."""
        # the other modes keep requests in the scheduler, which may not sleep then
        await http.post("/pause_generation", {"mode": "abort"})
        await self._until_idle(http)

    async def resume(self, http: Http) -> None:
        """Go on after ``pause``."""
        await http.post("/continue_generation", {})

    async def sleep(self, http: Http, *, keeps_weights: bool) -> None:
        """Give the GPU's memory back; paused. The base of an adapter is kept in host memory.

        Other weights that shall be kept stay on the GPU.
        """
        # to take back what was not given ends the server
        self._gave_weights = self._is_backed_up or not keeps_weights
        tags = ["kv_cache", "weights"] if self._gave_weights else ["kv_cache"]
        await http.post("/release_memory_occupation", {"tags": tags}, timeout_s=MEMORY_S)

    async def wake_weights(self, http: Http) -> None:
        """Take the weights' memory again, so that they can be loaded."""
        if self._gave_weights:
            await http.post("/resume_memory_occupation", {"tags": ["weights"]}, timeout_s=MEMORY_S)

    async def wake_cache(self, http: Http) -> None:
        """Take the memory of the key-value cache again."""
        await http.post("/resume_memory_occupation", {"tags": ["kv_cache"]}, timeout_s=MEMORY_S)

    async def load(self, http: Http, weights: Weights) -> None:
        """Load weights or adapter, and forget every cached prefix. Paused, weights awake."""
        if weights.is_adapter:
            await self._load_adapter(http, weights)
        else:
            await self._load_all(http, weights)
        await self._until_idle(http)

    async def _load_all(self, http: Http, weights: Weights) -> None:
        from querl.rollout.pickled import buckets, reachable, release_handles

        for bucket in buckets(weights.tensors(), max_bytes=BUCKET_BYTES):
            sent = reachable(bucket, shares_memory=self._settings.shares_memory)
            await http.post(
                "/update_weights_from_tensor",
                # a flush that fails in here ends the server, so that it is asked for apart
                {"serialized_named_tensors": await self._for_ranks(sent), "flush_cache": False},
                timeout_s=LOAD_S,
            )
            del sent
            release_handles()

    async def _load_adapter(self, http: Http, weights: Weights) -> None:
        from querl.rollout.pickled import read_adapter

        with tempfile.TemporaryDirectory() as folder:
            weights.save_adapter(Path(folder))
            tensors, config = read_adapter(Path(folder))
        # each under a name of its own: those of a server that was started anew are not known here
        self._num_adapters += 1
        name = f"querl-{self._num_adapters}"
        await http.post(
            "/load_lora_adapter_from_tensors",
            {
                "lora_name": name,
                "config_dict": _as_served(config),
                "serialized_named_tensors": await self._for_ranks(tensors),
            },
            timeout_s=LOAD_S,
        )
        self._adapter = name

    async def _for_ranks(self, tensors: object) -> list[str]:
        from querl.rollout.pickled import pickled

        ranks = range(self._settings.tensor_parallel)
        return [await asyncio.to_thread(pickled, tensors) for _ in ranks]

    async def _until_idle(self, http: Http) -> None:
        """Forget the cache, which waits for the last cut request to leave the scheduler."""
        params = {"timeout": f"{IDLE_S:g}"}
        await http.post("/flush_cache", params=params, timeout_s=2 * IDLE_S)


# what a model's generation_config.json may set, and sampling from the model itself must not know
_UNTOUCHED = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
}
_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": None}


def _finish(reason: Mapping[str, Any]) -> FinishReason | None:
    """``stop`` is both a string, which is then named, and an end token, which has an id."""
    if reason["type"] not in _FINISH:
        raise EngineError(f"sglang: a completion ended by {reason['type']!r}: update querl")
    ended_by_token = reason["type"] == "stop" and isinstance(reason.get("matched"), int)
    return FinishReason.END if ended_by_token else _FINISH[reason["type"]]


def _as_served(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's configuration with its scale as alpha / rank: SGLang passes over rslora."""
    if not config.get("use_rslora"):
        return dict(config)
    return {
        **config,
        "use_rslora": False,
        "lora_alpha": config["lora_alpha"] * math.sqrt(config["r"]),
    }
