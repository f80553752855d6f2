"""Compare ways to sample responses of real, skewed lengths: padded batches, transformers' loops, ours, vLLM.

    python benchmarks/sampling.py [--rows 64] [--batch 8] [--cap 256] [--rounds 3] [--refill 0.25] [--tiny]
        [--vllm .venv-vllm/bin/python]

One process on the CPU in float32. The model is a Llama of 20M parameters with random weights, which never ends a
response. Each row gets the length of an answer of OASST1 as its limit, and a prompt as long as the message before that
answer (four characters count as a token). All ways sample the same rows, `--batch` at a time:

- padded: each batch runs to the end of its longest row, and ended rows stay in it: the authors' way.
- generate: transformers' `generate`, one batch after another; it cannot limit single rows, and makes as many steps.
- continuous: transformers' continuous batching, with a limit per row.
- ours, static: our loop without refill, and with transformers' cache; rows that end leave the batch.
- ours, refill S: newcomers join when a share S of the batch is free.
- vLLM: our sampler over a server with as many rows at once (`make install-vllm`), HTTP included.

Useful share: tokens of responses per slot and call of the model, calls that read prompts included. It predicts the gain
on a GPU, where a call takes nearly as long with one row as with all. Rounds are interleaved, and medians are printed.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))

import numpy as np  # noqa: E402
import polars as pl  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers import models as tokenizer_models  # noqa: E402
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.utils import logging  # noqa: E402

from salmon import vllm, vllm_server  # noqa: E402
from salmon.batching import batches, left_pad, position_ids  # noqa: E402
from salmon.config import Model  # noqa: E402
from salmon.sampling import Sampler, TransformersSampler  # noqa: E402

VOCABULARY = 8192
SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LONGEST_PROMPT = 256
TEMPERATURE = 0.7
STATIC = "ours, static"


@dataclass(frozen=True)
class Work:
    """The input of all ways: prompts, the number of tokens after each, rows at a time."""

    model: LlamaForCausalLM
    prompts: list[list[int]]
    limits: list[int]
    batch: int

    def parts(self) -> list[list[int]]:
        """Rows of each batch."""
        return batches([len(prompt) for prompt in self.prompts], self.batch)

    def config(self, tokens: int) -> GenerationConfig:
        """The configuration of transformers' loops."""
        return GenerationConfig(
            do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=tokens, pad_token_id=0
        )


@torch.no_grad()
def padded(work: Work) -> None:
    """Run all rows of a batch until the last one ends."""
    for part in work.parts():
        ids, mask = left_pad([work.prompts[row] for row in part])
        positions, cache = position_ids(mask), None
        for _ in range(max(work.limits[row] for row in part)):
            output = work.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            )
            cache = output.past_key_values
            ids = torch.multinomial(torch.softmax(output.logits[:, -1] / TEMPERATURE, dim=-1), 1)
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)


@torch.no_grad()
def generate(work: Work) -> None:
    """Transformers' `generate`."""
    for part in work.parts():
        ids, mask = left_pad([work.prompts[row] for row in part])
        config = work.config(max(work.limits[row] for row in part))
        work.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)


@torch.no_grad()
def continuous(work: Work) -> None:
    """Transformers' continuous batching."""
    attention = work.model.config._attn_implementation
    pages = 64
    blocks = work.batch * (-(-(LONGEST_PROMPT + max(work.limits)) // pages) + 1)
    batching = ContinuousBatchingConfig(
        page_size=pages,
        num_blocks=blocks,
        max_batch_tokens=work.batch * LONGEST_PROMPT,
        max_requests_per_batch=work.batch,
        allow_block_sharing=False,
    )
    with work.model.continuous_batching_context_manager(
        generation_config=work.config(max(work.limits)), continuous_batching_config=batching, block=True, timeout=5
    ) as manager:
        names = {
            manager.add_request(work.prompts[row], max_new_tokens=work.limits[row]): row
            for part in work.parts()
            for row in part
        }
        left = len(names)
        while left:
            result = manager.get_result(timeout=60)
            if result is None:
                raise RuntimeError("continuous batching stopped")
            if result.is_finished():
                if len(result.generated_tokens) != work.limits[names[result.request_id]]:
                    raise RuntimeError(f"{result.error}")
                left -= 1
    work.model.set_attn_implementation(attention)


def ours(refill: float) -> Callable[[Work], None]:
    """Our loop; newcomers join when this share of the batch is free."""

    def sample(work: Work) -> None:
        by(TransformersSampler(make_tokenizer(), "cpu", batch_size=work.batch, refill=refill, model=work.model))(work)

    return sample


def by(sampler: Sampler) -> Callable[[Work], None]:
    """A sampler's results for all rows."""

    def sample(work: Work) -> None:
        seeds = range(len(work.prompts))
        found = sampler.sample(work.prompts, seeds, max_new_tokens=work.limits, temperature=TEMPERATURE)
        assert [len(each.tokens) for each in found] == work.limits

    return sample


@contextmanager
def engine(work: Work, python: str, longest: int) -> Iterator[Sampler]:
    """A vLLM server of the same model."""
    with TemporaryDirectory() as folder:
        tokenizer = make_tokenizer()
        work.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        hardware = vllm_server.Hardware(python=python, max_rows=work.batch)
        model = Model(base=folder, quantization="none", dtype="float32")
        with vllm_server.start(hardware, model, longest=longest, key="--cap", rank=None) as server:
            yield vllm.VllmSampler(server, tokenizer, set())


def main() -> None:
    """Measure all ways in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="responses")
    parser.add_argument("--batch", type=int, default=8, help="rows at a time")
    parser.add_argument("--cap", type=int, default=256, help="tokens of the longest response")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way; medians are printed")
    parser.add_argument("--refill", type=float, nargs="+", default=[0.25], help="shares to measure")
    parser.add_argument(
        "--tiny", action="store_true", help="a model of 0.5M, whose calls take as long with one row as with all"
    )
    parser.add_argument("--vllm", metavar="PYTHON", help="also measure vLLM, with this interpreter")
    args = parser.parse_args()
    logging.set_verbosity_error()

    prompts, limits = draw(args.rows, args.cap)
    work = Work(make_model(TINY if args.tiny else SIZES), prompts, limits, args.batch)
    ways = {"padded": padded, "generate": generate, "continuous": continuous, STATIC: ours(1.0)}
    ways |= {f"ours, refill {share:g}": ours(share) for share in args.refill}
    parameters = sum(parameter.numel() for parameter in work.model.parameters())
    print(
        f"{parameters / 1e6:.1f}M parameters, {torch.get_num_threads()} threads, {args.rows} rows, batch {args.batch}: "
        f"prompts of {np.mean([*map(len, prompts)]):.0f} tokens, responses of {np.mean(limits):.0f} (median "
        f"{np.median(limits):.0f}, longest {max(limits)})",
        flush=True,
    )
    calls: dict[str, int] = {}
    with ExitStack() as stack:
        if args.vllm:
            ways["vLLM"] = by(stack.enter_context(engine(work, args.vllm, LONGEST_PROMPT + args.cap)))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                calls[name], took = measure(work, way)
                seconds[name].append(took)
    before = median(seconds[STATIC])
    columns = ["way", "tokens/s", f"speed relative to {STATIC}", "calls of the model", "useful share"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name in ways:
        took = median(seconds[name])
        counted = f"{calls[name]} | {sum(limits) / (args.batch * calls[name]):.2f}" if calls[name] else "not seen |"
        print(f"| {name} | {sum(limits) / took:.0f} | {before / took:.2f} | {counted} |")


def measure(work: Work, way: Callable[[Work], None]) -> tuple[int, float]:
    """Calls of the model, and seconds."""
    calls: list[None] = []
    hook = work.model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(None))
    torch.manual_seed(0)
    began = time.perf_counter()
    try:
        way(work)
    finally:
        hook.remove()
    return len(calls), time.perf_counter() - began


def draw(rows: int, cap: int) -> tuple[list[list[int]], list[int]]:
    """Prompts and lengths of responses, as long as messages of OASST1 and their answers, at four characters a token."""
    messages = pl.read_parquet(ROOT / "tests/data/oasst1/validation_sample.parquet")
    lengths = messages.select("message_id", asked=pl.col("text").str.len_chars() // 4)
    answers = messages.filter(pl.col("role") == "assistant").join(lengths, left_on="parent_id", right_on="message_id")
    random = np.random.default_rng(0)
    chosen = answers.sort("message_id")[random.permutation(len(answers))[:rows]]
    asked = chosen["asked"].clip(4, LONGEST_PROMPT).to_list()
    limits = (chosen["text"].str.len_chars() // 4).clip(4, cap).to_list()
    return [random.integers(3, VOCABULARY, length).tolist() for length in asked], limits


def make_model(sizes: dict[str, int]) -> LlamaForCausalLM:
    """A Llama with random weights and no end token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig()
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token, and no end token."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(tokenizer_models.WordLevel(words, unk_token="w0")))  # noqa: S106


if __name__ == "__main__":
    main()
