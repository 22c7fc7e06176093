"""A small real server with vLLM's routes and its sharp edges, over a real model on the CPU.

    python tests/engine_server.py --model FOLDER --port N --max-model-len N [...]

It takes the flags that vLLM would be started with, and computes as vLLM does where engines have
been bitten: what is cached of prefixes outlives new weights, a sampler's numbers begin anew with
each request, and discarded weights are no numbers. Three flags more are for faults: it ends at the
``--dies-at``-th request, answers each one after ``--seconds-a-token``, and runs out of memory for
prompts longer than ``--memory`` tokens, as vLLM does: a refusal, and then it is gone. Weights come
by querl's own worker extension, as in vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from aiohttp import web
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

OUT_OF_MEMORY = "EngineCore encountered an issue. See stack trace (above) for the root cause."


class Server:
    """One model, its tokenizer, and what vLLM's scheduler and cache remember."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.tokenizer = AutoTokenizer.from_pretrained(flags.model)
        self.model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32).eval()
        self.kept: dict[str, Tensor] = {}  # weights in host memory
        self.adapter: str | None = None
        self.asleep: set[str] = set()
        self.buffer: Tensor | None = None  # the learner's, while weights are loaded
        self.cached: dict[tuple[str | None, tuple[int, ...]], Tensor] = {}
        self.running: set[asyncio.Event] = set()  # set where a request is to be cut
        self.is_paused = False
        self.changed = asyncio.Condition()
        self.num_requests = 0
        self.seats = asyncio.Semaphore(flags.max_num_seqs)
        self.thread = ThreadPoolExecutor(1)

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        params, prompt, model = body["sampling_params"], tuple(body["token_ids"]), body.get("model")
        self.num_requests += 1
        if self.num_requests == self.flags.dies_at:
            _die("it was told to die at this request")
        if len(prompt) > self.flags.memory:
            asyncio.get_running_loop().call_later(0.2, _die, "torch.OutOfMemoryError: CUDA")
            return _refusal(OUT_OF_MEMORY, status=500)
        if len(prompt) + params["max_tokens"] > self.flags.max_model_len:
            return _refusal("This model's maximum context length is less than that")
        if model not in (None, self.flags.served_model_name, self.flags.model, self.adapter):
            return _refusal(f"The model `{model}` does not exist.", status=404)
        async with self.changed:
            await self.changed.wait_for(lambda: not self.is_paused)
        if self.asleep or self.buffer is not None:
            _die("a request ran without weights or cache")
        cut = asyncio.Event()
        self.running.add(cut)
        try:
            async with self.seats:  # a pause finds those that wait for one, too
                choice = await self._sample(prompt, params, model == self.adapter, cut)
        finally:
            self.running.discard(cut)
        return web.json_response({"request_id": "0", "model": model, "choices": [choice]})

    async def _sample(
        self, prompt: tuple[int, ...], params: dict[str, Any], is_adapted: bool, cut: asyncio.Event
    ) -> dict[str, Any]:
        """Token by token, each alone, so that the result does not depend on who asks beside."""
        dice = torch.Generator().manual_seed(params["seed"])
        said: list[int] = []
        logprobs: list[dict[str, Any]] = []
        finish = "length"
        while len(said) < params["max_tokens"]:
            await asyncio.sleep(self.flags.seconds_a_token)
            if cut.is_set():
                finish = "abort"
                break
            logits = await asyncio.get_running_loop().run_in_executor(
                self.thread, self._logits, (*prompt, *said), is_adapted
            )
            token_id, logprob = _draw(logits, params, dice)
            said.append(token_id)
            logprobs.append({"token": f"token_id:{token_id}", "logprob": logprob})
            if self._is_stopped(said, params):
                finish = "stop"
                break
        content = {"content": logprobs}
        return {"index": 0, "logprobs": content, "finish_reason": finish, "token_ids": said}

    def _is_stopped(self, said: list[int], params: dict[str, Any]) -> bool:
        assert params["ignore_eos"]
        assert params["include_stop_str_in_output"]
        if said[-1] in params["stop_token_ids"]:
            return True
        text = self.tokenizer.decode(said)
        assert isinstance(text, str)
        return any(stop in text for stop in params["stop"])

    @torch.no_grad()
    def _logits(self, ids: tuple[int, ...], is_adapted: bool) -> Tensor:
        """Of the next token; computed once for a prefix, until the cache is reset."""
        name = self.adapter if is_adapted else None
        if (name, ids) not in self.cached:
            if isinstance(self.model, PeftModel):
                switch = self.model.base_model
                (switch.enable_adapter_layers if is_adapted else switch.disable_adapter_layers)()
            self.cached[name, ids] = self.model(input_ids=torch.tensor([ids])).logits[0, -1].float()
        return self.cached[name, ids]

    async def pause(self, request: web.Request) -> web.Response:
        assert request.query.get("mode", "abort") == "abort", "it would go on with an old cache"
        await self._pause()
        return web.json_response({"status": "paused"})

    async def _pause(self) -> None:
        self.is_paused = True
        for cut in self.running:
            cut.set()
        while self.running:
            await asyncio.sleep(0.01)
        self.cached.clear()

    async def resume(self, request: web.Request) -> web.Response:
        if self.asleep:
            _die("the scheduler was resumed asleep")
        await self._resume()
        return web.json_response({"status": "resumed"})

    async def _resume(self) -> None:
        async with self.changed:
            self.is_paused = False
            self.changed.notify_all()

    async def sleep(self, request: web.Request) -> web.Response:
        assert self.flags.enable_sleep_mode
        await self._pause()
        if request.query["level"] == "1":
            self.kept = {name: weight.clone() for name, weight in self._weights()}
        for _, weight in self._weights():
            weight.fill_(torch.nan)
        self.asleep = {"weights", "kv_cache"}
        return web.Response()

    async def wake_up(self, request: web.Request) -> web.Response:
        tags = set(request.query.getall("tags", ["weights", "kv_cache"]))
        if "weights" in tags & self.asleep and self.kept:
            for name, weight in self._weights():
                weight.copy_(self.kept.pop(name))
        self.asleep -= tags
        if not self.asleep:
            await self._resume()
        return web.Response()

    def _weights(self) -> list[tuple[str, Tensor]]:
        """Of the base, by the names of its folder."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return [
            (name.replace(".base_layer.", "."), weight.data)
            for name, weight in model.named_parameters()
            if ".lora_" not in name
        ]

    async def collective_rpc(self, request: web.Request) -> web.Response:
        """What querl's own extension does in vLLM's workers, with its hands on the buffer."""
        body = await request.json()
        if body["method"] == "check_health":  # of a worker, between two batches
            return web.json_response({"results": [None]})
        if not self.is_paused or self.running or "weights" in self.asleep:
            _die("weights were loaded into what runs or sleeps")
        extension = importlib.import_module(self.flags.worker_extension_cls.split(".")[0])
        if body["method"] == "querl_begin":
            address = json.loads(body["args"][0])
            self.buffer = extension.see_buffer(address, torch.device("cpu"))
        elif body["method"] == "querl_finish":
            self.buffer = None
        else:
            contents = json.loads(body["args"][0])
            weights = dict(self._weights())
            for name, found in extension.copied_tensors(self.buffer, contents, torch.device("cpu")):
                if name not in weights:
                    return _refusal(f"KeyError: {name}", status=500)
                weights[name].copy_(found)
        return web.json_response({"results": [None]})

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:
        if not self.running:
            self.cached.clear()
        return web.json_response({"success": not self.running})

    async def load_adapter(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, folder = body["lora_name"], body["lora_path"]
        if not self.flags.enable_lora or (name == self.adapter and not body.get("load_inplace")):
            return _refusal(f"The lora adapter '{name}' has already been loaded.")
        base = self.model.unload() if isinstance(self.model, PeftModel) else self.model
        self.model = PeftModel.from_pretrained(base, folder).eval()
        self.adapter = name
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")


def _draw(logits: Tensor, params: dict[str, Any], dice: torch.Generator) -> tuple[int, float]:
    """A token and its log-probability under the distribution that it was drawn from."""
    if not params["temperature"]:
        token_id = int(logits.argmax())
        return token_id, float(logits.log_softmax(-1)[token_id])
    logprobs = (logits / params["temperature"]).log_softmax(-1)
    ranked, order = logprobs.sort(descending=True)
    is_cut = ranked.exp().cumsum(-1) - ranked.exp() >= params["top_p"]
    logprobs[order[is_cut & (torch.arange(len(order)) > 0)]] = -torch.inf
    logprobs = logprobs.log_softmax(-1)
    token_id = int(torch.multinomial(logprobs.exp(), 1, generator=dice))
    return token_id, float(logprobs[token_id])


def _refusal(message: str, *, status: int = 400) -> web.Response:
    error = {"message": message, "type": "BadRequestError", "code": status}
    return web.json_response({"error": error}, status=status)


def _die(message: str) -> None:
    sys.stderr.write(f"AssertionError: {message}\n")
    os._exit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-model-name")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--worker-extension-cls")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--enable-sleep-mode", action="store_true")
    parser.add_argument("--dies-at", type=int)
    parser.add_argument("--seconds-a-token", type=float, default=0.0)
    parser.add_argument("--memory", type=int, default=10**9)
    return parser.parse_known_args()[0]


def main() -> None:
    torch.set_num_threads(1)
    flags = parse()
    server = Server(flags)
    app = web.Application(client_max_size=2**30)
    app.router.add_get("/health", server.health)
    for route, handler in {
        "/inference/v1/generate": server.generate,
        "/pause": server.pause,
        "/resume": server.resume,
        "/sleep": server.sleep,
        "/wake_up": server.wake_up,
        "/collective_rpc": server.collective_rpc,
        "/reset_prefix_cache": server.reset_prefix_cache,
        "/v1/load_lora_adapter": server.load_adapter,
    }.items():
        app.router.add_post(route, handler)
    web.run_app(app, host="127.0.0.1", port=flags.port, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
