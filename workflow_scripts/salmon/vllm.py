"""vLLM as a sampling engine: the `Sampler` that asks a server, and the adapters that it is given.

Token ids go in and out. Which response ends where is decided here, by the rule of `generation`, not by the engine.
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
"""Requests of the same tokens that may fail to reach a server that is up."""
BEAT, MISSED = 30.0, 10
"""Seconds between two looks after the server, and how many may fail in a row."""
_FILES = 200  # that the job has open besides


def end_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end a response, as `generation.end_tokens` finds them in a loaded model."""
    remote: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    if find_file(model.base, model.revision, "generation_config.json"):
        settings = GenerationConfig.from_pretrained(model.base, revision=model.revision)
    else:
        settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model.base, **remote))
    named = settings.eos_token_id
    more = named if isinstance(named, list) else [named]
    return {token for token in [tokenizer.eos_token_id, *more] if token is not None}


def adapter_folder(model: Model) -> Path | None:
    """The folder of a model's adapter, fetched if it is on the hub; None where it has none.

    Raises:
        UserError: where it cannot be had.
    """
    if model.adapter is None:
        return None
    folder, _ = find_adapter(model.adapter, model.adapter_revision)
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"the weights of the adapter {model.adapter} (model.adapter) are not in safetensors, which vLLM reads: "
            "load it with PEFT where you trust it, and save it again"
        )
    return folder.absolute()


def adapter_rank(model: Model, lora: Lora | None = None) -> int | None:
    """The largest rank of the policy's adapter: the model's own, or a new one by `lora`; None where there is none."""
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
    """What samples from one model, its adapter included, until the end of the block; arguments as for `start`."""
    with start(hardware, model, longest=longest, key=key, rank=adapter_rank(model)) as engine:
        sampler = VllmSampler(engine, tokenizer, end_tokens(model, tokenizer))
        if adapter := adapter_folder(model):
            sampler.push(adapter)
        try:
            yield sampler
        finally:
            sampler.close()


class VllmSampler:
    """Samples with an engine, from the base model until an adapter is pushed.

    Args:
        engine: that is up.
        tokenizer: of the model.
        ends: tokens that end a response (`end_tokens`).
        folder: for the adapters of `sync`, read by all machines; nothing else may be in it.
        export: writes the policy's adapter into a new folder; all ranks call it, one of them writes.
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
        # A server of the user knows the adapters of other jobs, and of those that were killed.
        self.tag = distributed.broadcast(secrets.token_hex(6))

    def push(self, adapter: Path) -> None:
        """Sample from the base model with this adapter from here on.

        The folder has to stay until the next one is pushed. A name is used for one adapter only: vLLM keeps what it has
        read of prompts by the adapter's name, and would go on using it for other weights.
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
        """Whether this rank tells a server of its adapters: the one that has started it, or the first one."""
        return self.engine.server is not None or (self.engine.socket is None and distributed.is_main())

    def _prove(self, adapter: Path) -> None:
        """Refuse an adapter that changes nothing at the engine, though its weights are not zero.

        vLLM leaves out weights of layers that it knows under other names, without a word.
        """
        with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as weights:
            names = [name for name in weights.keys() if "lora_B" in name or "lora_embedding_B" in name]  # noqa: SIM118
            if not any(weights.get_tensor(name).any() for name in names):
                return  # a fresh one
        prompt = list(self.tokenizer("To be or not to be")["input_ids"]) or [0]
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 1.0, "seed": 0, "prompt_logprobs": 0}
        with_it, without = (
            self.engine.post("/v1/completions", body | {"model": name})["choices"][0]["prompt_logprobs"]
            for name in (self.served, self.engine.served)
        )
        if with_it == without:
            raise UserError(
                f"vLLM does not apply the adapter {adapter}: it knows the model's layers under other names. Sample "
                "with the engine `transformers`"
            )
        self.is_proven = True

    def close(self) -> None:
        """Let a server of the user forget the adapter."""
        if self.engine.socket is None and distributed.is_main() and self.served != self.engine.served:
            with suppress(UserError):
                self.engine.post("/v1/unload_lora_adapter", {"lora_name": self.served})

    def sync(self, policy: nn.Module) -> None:
        """See `Sampler`; the policy's adapter is written, and pushed to the engine."""
        if self.folder is None or self.export is None:
            raise ValueError("this sampler was made to sample from one policy")
        before = self.folder / f"{self.tag}-{self.pushes}"
        if distributed.is_main():
            if self.pushes == 0:
                artifacts.remove(self.folder)  # of a job that was killed
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
        if temperature and not low <= temperature <= high:  # as of evaluation.engine, which samples at ppo.temperature
            raise UserError(f"vLLM samples at a temperature of 0, or from {low} to {high}, and not at {temperature}")
        bodies = [
            {
                "model": self.served,
                "prompt": list(prompt),
                "seed": seed,
                "max_tokens": limit,
                "temperature": temperature,
                "top_p": top_p,
                "stop_token_ids": sorted(self.ends),
                "ignore_eos": True,  # which it takes from the base's tokenizer; those above still end a response
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
        # The engine looks for stop strings in its own reading of the tokens. Where it has ended a response that ours
        # does not end, the same tokens are drawn again, and more of them: a row's seed decides.
        early = [row for row, generation in enumerate(found) if generation is None]
        if early:
            longer = [bodies[row] | {"stop": []} for row in early]
            again = ended(early, asyncio.run(self._complete_all(longer)))
            for row, generation in zip(early, again, strict=True):
                found[row] = generation
        generations = [generation for generation in found if generation is not None]
        if len(generations) < len(found):
            raise UserError(
                f"the vLLM server has ended {len(found) - len(generations)} responses before their limit, and not by "
                "an end token: options of the resource engine, or of the server, end them"
            )
        return generations

    async def _complete_all(self, bodies: Sequence[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
        """Tokens and log probabilities of all requests, in their order."""
        meter = script.Meter(total=len(bodies), what="responses", says_end=False)
        # Some wait at the server, so that it is never idle. Each is a connection, and a file.
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
        """Raise where the server does not answer any more, though its connections stay."""
        missed = 0
        while missed < MISSED:
            await asyncio.sleep(BEAT)
            try:
                answer = await client.get("/health", timeout=BEAT)
                missed = 0 if answer.status_code == httpx2.codes.OK else missed + 1
            except httpx2.TransportError:
                missed += 1
        self.engine.check(DYING)
        raise UserError(f"the vLLM server has not answered for {MISSED * BEAT:.0f} s; what has been sampled is kept")

    async def _complete(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        """Tokens and log probabilities of one request."""
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                response = await client.post("/v1/completions", content=json.dumps(body), headers=_JSON)
            except httpx2.TransportError as error:  # a server closes idle connections; or it has died
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
        UserError: where it has none, or some that are not finite.
    """
    try:
        choice = response.json()["choices"][0]
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if len(tokens) != len(logprobs) or not all(math.isfinite(value) for value in logprobs):
            raise ValueError
    except (ValueError, LookupError, TypeError):
        raise UserError(
            "the vLLM server answers without tokens and finite log probabilities: it needs a version that tells "
            "token ids, and a dtype in which the model's logits are finite (bfloat16 where float16 overflows)"
        ) from None
    return tokens, logprobs
