"""Sample one shard of response0 or response1 from the initial policy.

Reference step 1, paper section 3.2. A row's random numbers depend only on its seed and its prompt, so neither shards
nor batches nor ranks change the samples (see `salmon/generation.py`).
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import polars as pl
import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from salmon import checked, distributed, encoding, models, provenance, resuming, script, shards, vllm, vllm_server
from salmon.config import Model, PolicyPrompt, Sampling
from salmon.randomness import seed_of
from salmon.sampling import Ranks, Sampler, TransformersSampler, without_thinking
from salmon.tables import PROMPT_TOO_LONG, PROMPTS, RESPONSES
from salmon.text import join_instruction
from salmon.tokenizers import load_tokenizer
from salmon.work import WorkFolder


class Arguments(script.Arguments):
    """Sample one shard of response0 or response1 from the initial policy."""

    prompts: Path = Field(description="prompts (parquet): prompt_id, source, instruction, input")
    output: Path = Field(description="responses of the shard (parquet); its manifest is written next to it")
    index: int = Field(ge=0, le=1, description="which response, and which of sampling.seeds")
    shard: int = Field(
        ge=0, description="which of sampling.shards, from 0: row i of the prompts is in shard i % shards"
    )
    model: Model = Field(description="section of the configuration")
    sampling: Sampling = Field(description="section of the configuration")
    policy_prompt: PolicyPrompt = Field(description="section of the configuration")
    batch_size: int = Field(16, ge=1, description="prompts at a time on a GPU; only speed and memory depend on it")
    tensor_parallel: bool = Field(
        False, description="hardware: all GPUs of the job share one model; not for an engine, which has its own option"
    )
    engine_base: Path | None = Field(
        None, description="folder of dequantize_base; the engine serves it in place of 4-bit weights"
    )
    engine: vllm_server.Hardware = Field(
        vllm_server.Hardware(), description="hardware: where the engine runs, if there is one"
    )


def main(arguments: Arguments) -> None:
    """Sample the rows that an earlier run has not sampled, write the manifest and then the table."""
    device = distributed.init()
    sampling = arguments.sampling
    table = read_shard(arguments)
    tokenizer = load_tokenizer(arguments.model)
    prompts = encode(table, tokenizer, arguments.policy_prompt)
    table = table.with_columns(pl.Series("prompt_tokens", map(len, prompts), pl.Int32))
    preamble = encoding.read_preamble(arguments.policy_prompt)
    # The common beginning of all prompts does not count: a longer preamble does not shorten answers.
    longest = encoding.shared_tokens(tokenizer, arguments.policy_prompt, preamble) + sampling.max_length

    origin = origin_of(arguments)
    inputs = origin.identify()
    packages = vllm_server.packages(arguments.engine) if sampling.engine == "vllm" else {}
    work = WorkFolder(arguments.output)
    if work.open(origin.fingerprint(inputs, packages)):
        distributed.leave()
        return
    schema = RESPONSES.schema | {"thinking_cut": pl.Boolean()}
    left = resuming.left_to_do(work, table["prompt_id"].to_list(), schema)
    left = [row for row in left if len(prompts[row]) < longest]
    begun = encoding.begins_thinking(tokenizer, arguments.policy_prompt, preamble)

    def sample(sampler: Sampler, rows: list[int]) -> pl.DataFrame:
        batch = table[rows]
        generations = sampler.sample(
            [prompts[row] for row in rows],
            [seed_of("response", sampling.seeds[arguments.index], prompt_id) for prompt_id in batch["prompt_id"]],
            max_new_tokens=[longest - len(prompts[row]) for row in rows],
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=arguments.policy_prompt.stop,
        )
        markers = arguments.policy_prompt.thinking
        answers = [without_thinking(tokenizer, each, markers, begun=begun) for each in generations]
        return batch.with_columns(
            pl.Series("response", [text for text, _ in answers], pl.String),
            pl.Series("finish_reason", [each.finish_reason for each in generations], pl.String),
            pl.Series("response_tokens", [len(each.tokens) for each in generations], pl.Int32),
            pl.Series("thinking_cut", [cut for _, cut in answers], pl.Boolean),
        ).select(list(schema))

    fitting = sum(len(prompt) < longest for prompt in prompts)
    by_engine = sampling.engine == "vllm"
    at_once = arguments.engine.max_rows if by_engine else arguments.batch_size
    if left:
        with open_sampler(arguments, tokenizer, device, longest) as sampler:
            resuming.run_batches(
                work,
                {row: len(prompts[row]) for row in left},
                rows_per_part(fitting, at_once),
                partial(sample, sampler),
                "prompts",
                together=arguments.tensor_parallel and not by_engine,
            )
    if distributed.is_main():
        sampled = work.read_parts(schema)
        responses = join(table, sampled.drop("thinking_cut"), longest)
        counts = {"rows": responses.height, **Counter(responses["finish_reason"])}
        counts["thinking_cut"] = int(sampled["thinking_cut"].sum())
        resuming.write_shard(work, responses, RESPONSES, origin.manifest(inputs, counts, packages))
    distributed.leave()


@contextmanager
def open_sampler(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase, device: torch.device, longest: int
) -> Iterator[Sampler]:
    """The initial policy's sampler, for up to `longest` tokens of prompt and response."""
    if arguments.sampling.engine == "vllm":
        model = vllm_server.served(arguments.model, arguments.engine_base)
        with vllm.open_sampler(
            arguments.engine,
            model,
            tokenizer,
            longest=longest,
            key="policy_prompt.template's preamble + sampling.max_length",
        ) as sampler:
            yield sampler
        return
    together = arguments.tensor_parallel
    policy = models.load_initial_policy(arguments.model, device, together=together)
    models.check_context(policy, longest, "policy_prompt.template's preamble + sampling.max_length")
    ranks: Ranks = "together" if together else "apart"
    yield TransformersSampler(tokenizer, device, batch_size=arguments.batch_size, ranks=ranks, model=policy)


def rows_per_part(rows: int, batch_size: int) -> int:
    """Number of rows that one call samples, and that are kept when all of them have ended.

    Within a call slots are refilled; at its end they drain. With the lengths of OASST1's answers, 0.38 of the slots'
    steps are useful if a call is one batch of 16, 0.55 if it is two, 0.77 if it is eight. On the other hand, a killed
    job loses the current call, and ranks share whole calls. Therefore there are 16 calls if each then has two to eight
    batches. Eight take four times as long as one that is not refilled: on one GPU about two minutes for a model of 7B.

    Args:
        rows: rows of the whole shard, so that calls are equal for any number of ranks, and after an interruption.
        batch_size: rows sampled at once.
    """
    rounds = math.ceil(rows / (16 * 8 * batch_size))
    return max(2 * batch_size, math.ceil(rows / (16 * max(1, rounds))))


def read_shard(arguments: Arguments) -> pl.DataFrame:
    """The prompts of the shard: prompt_id, source, instruction, input."""
    whole = checked.read(arguments.prompts, PROMPTS)
    return shards.rows_of(whole, arguments.shard, arguments.sampling.shards).collect()


def encode(table: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, prompt: PolicyPrompt) -> list[list[int]]:
    """Token ids of every row's prompt."""
    preamble = encoding.read_preamble(prompt)
    return [
        encoding.encode_prompt(tokenizer, join_instruction(*row), prompt, preamble)
        for row in table.select("instruction", "input").iter_rows()
    ]


def origin_of(arguments: Arguments) -> provenance.Origin:
    """The settings that affect the responses of the shard."""
    return provenance.sample_responses(
        arguments.prompts,
        arguments.index,
        arguments.shard,
        model=arguments.model,
        sampling=arguments.sampling,
        policy_prompt=arguments.policy_prompt,
    )


def join(table: pl.DataFrame, sampled: pl.DataFrame, longest: int) -> pl.DataFrame:
    """The rows of a shard in order, with their responses; a prompt without room has an empty response.

    Args:
        table: prompt_id, source, instruction, input, prompt_tokens.
        sampled: RESPONSES, one row for each prompt of fewer than `longest` tokens.
        longest: maximum tokens of prompt and response, preamble included.
    """
    skipped = table.filter(pl.col("prompt_tokens") >= longest).with_columns(
        response=pl.lit(""), finish_reason=pl.lit(PROMPT_TOO_LONG), response_tokens=pl.lit(0, pl.Int32)
    )
    rows = pl.concat([sampled, skipped.select(list(RESPONSES.columns))])
    return shards.in_order(rows, table.select("prompt_id"))


if __name__ == "__main__":
    script.run(main, Arguments)
