"""vLLM as a sampling engine: the `Sampler` that sends requests to a server, and the server's adapters.

Requests and answers are token ids. This module, not the engine, decides where a response ends, as in `generation`.
"""

import asyncio
import json
import math
import resource
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from salmon import artifacts, distributed, script
from salmon.adapters import find_adapter
from salmon.border import read_json
from salmon.config import VLLM_TEMPERATURES, Lora, Model
from salmon.errors import UserError
from salmon.sampling import Generation, replay
from salmon.tokenizers import find_file
from salmon.vllm_server import DYING, Engine, Hardware, start

ATTEMPTS = 5
"""Number of attempts per request to reach a running server."""
BEAT, MISSED = 30.0, 10
"""Seconds between two checks of the server, and how many may fail in a row."""
_FILES = 200  # other files that the job has open


def end_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end a response, the same as `generation.end_tokens` finds in a loaded model."""
    remote: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    if find_file(model.base, model.revision, "generation_config.json"):
        settings = GenerationConfig.from_pretrained(model.base, revision=model.revision)
    else:
        settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model.base, **remote))
    named = settings.eos_token_id
    more = named if isinstance(named, list) else [named]
    return {token for token in [tokenizer.eos_token_id, *more] if token is not None}


def adapter_folder(model: Model) -> Path | None:
    """The folder of a model's adapter, fetched if it is on the hub; None if the model has none.

    Raises:
        UserError: if it is unavailable.
    """
    if model.adapter is None:
        return None
    folder, _ = find_adapter(model.adapter, model.adapter_revision)
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"the weights of the adapter {model.adapter} (model.adapter) are not in safetensors, which vLLM reads: "
            "load it with PEFT on a machine where you trust it, and save it again"
        )
    return folder.absolute()


def adapter_rank(model: Model, lora: Lora | None = None) -> int | None:
    """The largest rank of the policy's adapter: the model's own, or a new one from `lora`; None if there is none."""
    folder = adapter_folder(model)
    if folder is None:
        return lora.r if lora else None
    found = read_json(folder / "adapter_config.json", "", "fetch the adapter again")
    if found.get("use_dora"):
        raise UserError(f"{model.adapter} is DoRA, which vLLM does not serve: sample with the engine `transformers`")
    return max([int(found["r"]), *(found.get("rank_pattern") or {}).values()])


@contextmanager
def open_sampler(
    hardware: Hardware, model: Model, tokenizer: PreTrainedTokenizerBase, *, longest: int, key: str
) -> Iterator["VllmSampler"]:
    """A sampler for one model with its adapter, until the end of the block; arguments as for `start`."""
    with start(hardware, model, longest=longest, key=key, rank=adapter_rank(model)) as engine:
        sampler = VllmSampler(engine, tokenizer, end_tokens(model, tokenizer))
        if adapter := adapter_folder(model):
            sampler.push(adapter)
        try:
            yield sampler
        finally:
            sampler.close()


class VllmSampler:
    """Samples with an engine. Uses the base model until an adapter is pushed.

    Args:
        engine: the running engine.
        tokenizer: the model's tokenizer.
        ends: the tokens that end a response (`end_tokens`).
        folder: folder for the adapters of `sync`, which all machines can read; it may hold nothing else.
        export: writes the policy's adapter to a new folder; all ranks call it, one of them writes.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        ends: set[int],
        *,
        folder: Path | None = None,
        export: Callable[[Path], None] | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.ends = engine, tokenizer, ends
        self.folder, self.export = folder, export
        self.is_proven = False
        self.served = engine.served
        self.pushes = 0
        # The user's own server has the adapters of other jobs, including killed ones.
        self.tag = distributed.broadcast(secrets.token_hex(6))

    def push(self, adapter: Path) -> None:
        """From now on, sample from the base model with this adapter.

        The folder must stay until the next adapter is pushed. Each adapter needs a new name: vLLM caches prompts by the
        adapter's name, and would reuse the cache for other weights.
        """
        before, self.pushes = self.served, self.pushes + 1
        self.served = f"policy-{self.tag}-{self.pushes}"
        if self._pushes_for_others():
            if before != self.engine.served:
                self.engine.post("/v1/unload_lora_adapter", {"lora_name": before})
            self.engine.post("/v1/load_lora_adapter", {"lora_name": self.served, "lora_path": str(adapter.absolute())})
            if not self.is_proven:
                self._prove(adapter)
        distributed.barrier()

    def _pushes_for_others(self) -> bool:
        """Whether this rank sends adapters to a server: the rank that started it, or the first one."""
        return self.engine.server is not None or (self.engine.socket is None and distributed.is_main())

    def _prove(self, adapter: Path) -> None:
        """Refuse an adapter that has no effect in the engine although its weights are not zero.

        vLLM silently ignores weights of layers that have other names in vLLM.
        """
        with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as weights:
            names = [name for name in weights.keys() if "lora_B" in name or "lora_embedding_B" in name]  # noqa: SIM118
            if not any(weights.get_tensor(name).any() for name in names):
                return  # a new adapter
        prompt = list(self.tokenizer("To be or not to be")["input_ids"]) or [0]
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 1.0, "seed": 0, "prompt_logprobs": 0}
        with_it, without = (
            self.engine.post("/v1/completions", body | {"model": name})["choices"][0]["prompt_logprobs"]
            for name in (self.served, self.engine.served)
        )
        if with_it == without:
            raise UserError(
                f"vLLM does not apply the adapter {adapter}: it has other names for the model's layers. Sample "
                "with the engine `transformers`"
            )
        self.is_proven = True

    def close(self) -> None:
        """Remove the adapter from the user's own server."""
        if self.engine.socket is None and distributed.is_main() and self.served != self.engine.served:
            with suppress(UserError):
                self.engine.post("/v1/unload_lora_adapter", {"lora_name": self.served})

    def sync(self, policy: nn.Module) -> None:
        """See `Sampler`; writes the policy's adapter and pushes it to the engine."""
        if self.folder is None or self.export is None:
            raise ValueError("this sampler was made for a single policy")
        before = self.folder / f"{self.tag}-{self.pushes}"
        if distributed.is_main():
            if self.pushes == 0:
                artifacts.remove(self.folder)  # left from a killed job
            self.folder.mkdir(exist_ok=True)
        new = self.folder / f"{self.tag}-{self.pushes + 1}"
        self.export(new)
        distributed.barrier()
        self.push(new)
        if distributed.is_main():
            artifacts.remove(before)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: Sequence[int],
        temperature: float,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """See `Sampler`."""
        low, high = VLLM_TEMPERATURES
        if temperature and not low <= temperature <= high:  # as for evaluation.engine, which samples at ppo.temperature
            raise UserError(f"vLLM samples at a temperature of 0 or from {low} to {high}, not at {temperature}")
        bodies = [
            {
                "model": self.served,
                "prompt": list(prompt),
                "seed": seed,
                "max_tokens": limit,
                "temperature": temperature,
                "top_p": top_p,
                "stop_token_ids": sorted(self.ends),
                "ignore_eos": True,  # vLLM takes EOS from the base's tokenizer; the tokens above still end a response
                "stop": list(stop),
                "include_stop_str_in_output": True,
                "logprobs": 0,
                "return_token_ids": True,
            }
            for prompt, seed, limit in zip(prompts, seeds, max_new_tokens, strict=True)
        ]

        def ended(rows: Sequence[int], sampled: Sequence[tuple[list[int], list[float]]]) -> list[Generation | None]:
            of_rows = [prompts[row] for row in rows]
            limits = [max_new_tokens[row] for row in rows]
            return replay(self.tokenizer, of_rows, sampled, max_new_tokens=limits, ends=self.ends, stop=stop)

        found = ended(range(len(bodies)), asyncio.run(self._complete_all(bodies)))
        # The engine looks for stop strings in its own decoding of the tokens. If it has ended a response that our rule
        # does not end, the same tokens are drawn again, followed by more: a row's seed determines them.
        early = [row for row, generation in enumerate(found) if generation is None]
        if early:
            longer = [bodies[row] | {"stop": []} for row in early]
            again = ended(early, asyncio.run(self._complete_all(longer)))
            for row, generation in zip(early, again, strict=True):
                found[row] = generation
        generations = [generation for generation in found if generation is not None]
        if len(generations) < len(found):
            raise UserError(
                f"the vLLM server ended {len(found) - len(generations)} responses before their limit without an end "
                "token: check the options of the resource engine, or of the server"
            )
        return generations

    async def _complete_all(self, bodies: Sequence[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
        """Tokens and log probabilities of all requests, in order."""
        meter = script.Meter(total=len(bodies), what="responses", says_end=False)
        # Some requests wait at the server, so that it is never idle. Each takes a connection and a file.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * self.engine.max_rows
        if soft != resource.RLIM_INFINITY and soft < wanted + _FILES:
            soft = wanted + _FILES if hard == resource.RLIM_INFINITY else min(hard, wanted + _FILES)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            wanted = min(wanted, max(1, soft - _FILES))
        slots = asyncio.Semaphore(wanted)

        async def complete(body: dict[str, Any]) -> tuple[list[int], list[float]]:
            async with slots:
                found = await self._complete(client, body)
            meter.advance()
            return found

        async with self.engine.client() as client:
            watch = asyncio.ensure_future(self._watch(client))
            tasks = asyncio.gather(*map(complete, bodies))
            both: set[asyncio.Future[Any]] = {watch, tasks}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if watch.done() and not tasks.done():
                tasks.cancel()
                await watch  # raises
            watch.cancel()
            return await tasks

    async def _watch(self, client: httpx2.AsyncClient) -> None:
        """Raise an error if the server no longer answers although its connections stay open."""
        missed = 0
        while missed < MISSED:
            await asyncio.sleep(BEAT)
            try:
                answer = await client.get("/health", timeout=BEAT)
                missed = 0 if answer.status_code == httpx2.codes.OK else missed + 1
            except httpx2.TransportError:
                missed += 1
        self.engine.check(DYING)
        raise UserError(f"the vLLM server has not answered for {MISSED * BEAT:.0f} s; the samples so far are kept")

    async def _complete(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        """Tokens and log probabilities of one request."""
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                response = await client.post("/v1/completions", content=json.dumps(body), headers=_JSON)
            except httpx2.TransportError as error:  # the server closed an idle connection, or has died
                reason = type(error).__name__
                await asyncio.to_thread(self.engine.check, 2.0**attempt)
                await asyncio.sleep(0.5 * attempt)
                continue
            if response.status_code == httpx2.codes.OK:
                return _read(response)
            if response.status_code >= 500:
                await asyncio.to_thread(self.engine.check, DYING)
            raise UserError(
                f"the vLLM server answers {response.status_code} to a prompt of {len(body['prompt'])} tokens; its log "
                "says why"
            )
        raise UserError(f"the vLLM server could not be reached {ATTEMPTS} times in a row ({reason}); its log says why")


_JSON = {"Content-Type": "application/json"}


def _read(response: httpx2.Response) -> tuple[list[int], list[float]]:
    """Tokens and their log probabilities in an answer.

    Raises:
        UserError: if it has none, or some are not finite.
    """
    try:
        choice = response.json()["choices"][0]
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if len(tokens) != len(logprobs) or not all(math.isfinite(value) for value in logprobs):
            raise ValueError
    except (ValueError, LookupError, TypeError):
        raise UserError(
            "the vLLM server answers without tokens and finite log probabilities: it needs a version that returns "
            "token ids, and a dtype in which the model's logits are finite (bfloat16 if float16 overflows)"
        ) from None
    return tokens, logprobs
