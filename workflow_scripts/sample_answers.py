"""A policy's answers to prompts that nothing was trained on, and its distance from the initial policy.

They are sampled at RL's temperature. The draws belong to the prompt, so all policies are compared on the same ones.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedTokenizerBase

from salmon import artifacts, checked, encoding, likelihood, models, provenance, script, vllm, vllm_server
from salmon.config import Evaluation, Model, PolicyPrompt, Ppo
from salmon.distributed import init
from salmon.errors import UserError
from salmon.randomness import seed_of
from salmon.sampling import Sampler, TransformersSampler, without_thinking
from salmon.tables import ANSWERS, PROMPTS
from salmon.text import join_instruction
from salmon.tokenizers import load_tokenizer

log = logging.getLogger("salmon.sample_answers")


class Arguments(script.Arguments):
    """Sample answers of a policy."""

    prompts: Path = Field(description="prompts (parquet)")
    policy: Path | None = Field(None, description="folder of the policy; without it, the initial policy answers")
    output: Path = Field(description="answers (parquet); their manifest is written next to them")
    model: Model = Field(description="section of the configuration: the initial policy")
    policy_prompt: PolicyPrompt = Field(description="section of the configuration")
    ppo: Ppo = Field(description="section of the configuration")
    evaluation: Evaluation = Field(description="section of the configuration")
    batch_size: int = Field(32, ge=1, description="hardware: prompts sampled at once")
    engine_base: Path | None = Field(
        None, description="folder of dequantize_base; the engine serves it in place of 4-bit weights"
    )
    engine: vllm_server.Hardware = Field(
        vllm_server.Hardware(), description="hardware: where the engine runs, if there is one"
    )


def main(arguments: Arguments) -> None:
    """Sample, compare with the initial policy, write the table."""
    device, ppo = init(), arguments.ppo
    tokenizer = load_tokenizer(arguments.model)
    preamble = encoding.read_preamble(arguments.policy_prompt)
    table = checked.read(arguments.prompts, PROMPTS).collect()
    prompts = [
        encoding.encode_prompt(tokenizer, join_instruction(*row), arguments.policy_prompt, preamble)
        for row in table.select("instruction", "input").iter_rows()
    ]
    fits = [len(prompt) <= ppo.query_length for prompt in prompts]
    table, prompts = table.filter(fits), [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
    counts = {"prompts": len(fits), "longer_than_query_length": fits.count(False), "answers": len(prompts)}
    if not prompts:
        raise UserError(
            f"none of the {len(fits)} prompts of {arguments.prompts} has at most {ppo.query_length} tokens "
            "(ppo.query_length); name others in evaluation.prompts"
        )
    by_engine = arguments.evaluation.engine == "vllm"
    packages = vllm_server.packages(arguments.engine) if by_engine else {}
    policy = None if by_engine else models.load_policy(arguments.model, arguments.policy, device)
    with open_sampler(arguments, tokenizer, device, policy) as sampler:
        answers = sampler.sample(
            prompts,
            [seed_of("evaluation", arguments.evaluation.seed, prompt_id) for prompt_id in table["prompt_id"]],
            max_new_tokens=[ppo.response_length] * len(prompts),
            temperature=ppo.temperature,
            stop=arguments.policy_prompt.stop,
        )
    tokens = [answer.tokens for answer in answers]
    kl = np.zeros(len(tokens))
    if arguments.policy:
        policy = policy or models.load_policy(arguments.model, arguments.policy, device)
        kl += likelihood.sequence_logprobs(policy, prompts, tokens, ppo.temperature, arguments.batch_size)
        del policy, sampler
        initial = models.load_initial_policy(arguments.model, device)
        kl -= likelihood.sequence_logprobs(initial, prompts, tokens, ppo.temperature, arguments.batch_size)
    begun = encoding.begins_thinking(tokenizer, arguments.policy_prompt, preamble)
    markers = arguments.policy_prompt.thinking
    texts = [without_thinking(tokenizer, answer, markers, begun=begun)[0] for answer in answers]
    rows = table.with_columns(
        pl.Series("response", texts, pl.String),
        pl.Series("finish_reason", [answer.finish_reason for answer in answers], pl.String),
        pl.Series("prompt_tokens", map(len, prompts), pl.Int32),
        pl.Series("response_tokens", map(len, tokens), pl.Int32),
        pl.Series("kl", kl, pl.Float64),
    )
    log.info("%d answers of %.0f tokens on average, KL %.3f", len(rows), np.mean([*map(len, tokens)]), kl.mean())
    origin = provenance.sample_answers(
        arguments.prompts,
        arguments.policy,
        model=arguments.model,
        policy_prompt=arguments.policy_prompt,
        ppo=ppo,
        evaluation=arguments.evaluation,
    )
    manifest = origin.manifest(origin.identify(), counts, packages)
    artifacts.write_table(rows.select(list(ANSWERS.columns)).sort("prompt_id"), arguments.output, ANSWERS, manifest)


@contextmanager
def open_sampler(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase, device: torch.device, policy: nn.Module | None
) -> Iterator[Sampler]:
    """The policy's sampler. The policy is loaded unless an engine samples."""
    longest = arguments.ppo.query_length + arguments.ppo.response_length
    if policy is None:
        model = vllm_server.served(arguments.model, arguments.engine_base)
        model = model.with_adapter(arguments.policy) if arguments.policy else model
        with vllm.open_sampler(
            arguments.engine, model, tokenizer, longest=longest, key="ppo.query_length + ppo.response_length"
        ) as sampler:
            yield sampler
        return
    models.check_context(policy, longest, "ppo.query_length + ppo.response_length")
    yield TransformersSampler(tokenizer, device, batch_size=arguments.batch_size, model=policy)


if __name__ == "__main__":
    script.run(main, Arguments)
