"""The plainest dialect, for tests of engines over HTTP: vLLM's routes, weights through a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from tiny_policy import tiny_tokenizer

from querl.rollout.dialect import Piece
from querl.rollout.http_engine import HttpEngine
from querl.rollout.server import Server, ServerProcess
from querl.types import FinishReason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from querl.rollout.dialect import Weights
    from querl.rollout.engine import Sampling
    from querl.rollout.http import Http

SERVER = Path(__file__).with_name("engine_server.py")
CONTEXT = 256


@dataclass
class FileDialect:
    """``folder`` holds a model and its tokenizer; ``flags`` go to the server beside ours."""

    folder: Path
    flags: Sequence[str] = ()
    num_loads: int = field(default=0, init=False)
    name = "file"

    def command(self, *, python: str, port: int) -> Sequence[str]:
        ours = ["--model", str(self.folder), "--max-model-len", str(CONTEXT), "--enable-sleep-mode"]
        return [python, str(SERVER), "--port", str(port), *ours, *self.flags]

    def environment(self) -> Mapping[str, str]:
        return {"HF_HUB_OFFLINE": "1"}

    async def is_ready(self, http: Http) -> bool:
        await http.get("/health")
        return True

    def request(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int
    ) -> tuple[str, dict[str, Any]]:
        params = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": list(sampling.stop),
            "seed": seed,
        }
        return "/inference/v1/generate", {"token_ids": list(prompt_ids), "sampling_params": params}

    def piece(self, answer: Mapping[str, Any]) -> Piece:
        choice = answer["choices"][0]
        reasons = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": None}
        return Piece(
            token_ids=tuple(choice["token_ids"]),
            logprobs=tuple(one["logprob"] for one in choice["logprobs"]["content"]),
            finish=reasons[choice["finish_reason"]],
        )

    async def pause(self, http: Http) -> None:
        await http.post("/pause")

    async def resume(self, http: Http) -> None:
        await http.post("/resume")

    async def sleep(self, http: Http, *, keeps_weights: bool) -> None:
        await http.post("/sleep", params={"level": "1" if keeps_weights else "2"})

    async def wake_weights(self, http: Http) -> None:
        await http.post("/wake_up", params={"tags": "weights"})

    async def wake_cache(self, http: Http) -> None:
        await http.post("/wake_up", params={"tags": "kv_cache"})

    async def load(self, http: Http, weights: Weights) -> None:
        self.num_loads += 1
        file = self.folder / "published.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in weights.tensors()}, file)
        await http.post("/start_weight_update")
        await http.post("/update_weights", {"update_info": {"file": str(file)}})
        await http.post("/finish_weight_update")
        await http.post("/reset_prefix_cache")


def save_policy(model: PreTrainedModel, folder: Path) -> Path:
    """The model and the tokenizer of the tests as a Hugging Face folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def file_engine(folder: Path, *flags: str, **settings: Any) -> HttpEngine:
    """An engine over a server of this dialect that is started when it is first asked."""
    dialect = FileDialect(folder, flags)
    log = folder / "engine.log"
    seconds = settings.pop("start_timeout_s", 120.0)
    process: Server = ServerProcess(
        dialect, python=sys.executable, log=log, start_timeout_s=seconds
    )
    return HttpEngine(dialect, process, tiny_tokenizer(), context=CONTEXT, **settings)
