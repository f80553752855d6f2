"""Answers of a policy to prompts that nothing was trained on, and how far it has moved from the initial policy.

Sampled at the temperature of RL, with draws that are those of the prompt: policies are compared on the same ones.
"""

import logging
from pathlib import Path

import numpy as np
import polars as pl
from pydantic import Field

from salmon import artifacts, checked, encoding, likelihood, models, provenance, script
from salmon.config import Evaluation, Model, PolicyPrompt, Ppo
from salmon.distributed import init
from salmon.errors import UserError
from salmon.randomness import seed_of
from salmon.sampling import TransformersSampler, without_thinking
from salmon.tables import ANSWERS, PROMPTS
from salmon.text import join_instruction
from salmon.tokenizers import load_tokenizer

log = logging.getLogger("salmon.sample_answers")


class Arguments(script.Arguments):
    """Sample answers of a policy."""

    prompts: Path = Field(description="prompts (parquet)")
    policy: Path | None = Field(None, description="folder of the policy; without it, the initial policy answers")
    output: Path = Field(description="answers (parquet); the manifest is written beside them")
    model: Model = Field(description="section of the configuration: the initial policy")
    policy_prompt: PolicyPrompt = Field(description="section of the configuration")
    ppo: Ppo = Field(description="section of the configuration")
    evaluation: Evaluation = Field(description="section of the configuration")
    batch_size: int = Field(32, ge=1, description="hardware: prompts at a time")


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
    policy = models.load_policy(arguments.model, arguments.policy, device)
    models.check_context(policy, ppo.query_length + ppo.response_length, "ppo.query_length + ppo.response_length")
    sampler = TransformersSampler(tokenizer, device, batch_size=arguments.batch_size, model=policy)
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
    manifest = origin.manifest(origin.identify(), counts)
    artifacts.write_table(rows.select(list(ANSWERS.columns)).sort("prompt_id"), arguments.output, ANSWERS, manifest)


if __name__ == "__main__":
    script.run(main, Arguments)
