"""Scores of a policy's answers by every reward model of the runs, under each principle alone, plain and negated.

The principles are those of the reward model's training, and those of the policies' training in RL's wording.
"""

import logging
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from pydantic import BaseModel, Field

from salmon import artifacts, checked, distributed, encoding, models, principles, provenance, reward_model, script
from salmon.config import Model, RewardModel, Scoring
from salmon.tables import ANSWERS, SCORES
from salmon.text import join_instruction
from salmon.tokenizers import load_tokenizer

log = logging.getLogger("salmon.score_answers")


class Scorer(BaseModel):
    """A reward model, with the settings for its texts."""

    name: str = Field(description="name of the first run that has it")
    folder: Path = Field(description="folder of the reward model")
    principles: Path = Field(description="JSON list of dimension, definition, negative_definition")
    dimensions: list[str] = Field(description="names of the principles of its training")
    rl_principles: list[Path] = Field([], description="JSON lists of the principles of the policies' training")
    model: Model = Field(description="section of the configuration, without an adapter")
    tokenizer: Model = Field(description="model whose tokenizer is used")
    scoring: Scoring = Field(description="section of the configuration")
    settings: RewardModel = Field(description="section reward_model of the configuration")


class Arguments(script.Arguments):
    """Score a policy's answers."""

    answers: Path = Field(description="answers (parquet)")
    output: Path = Field(description="scores (parquet); their manifest is written next to them")
    scorers: script.JsonList[Scorer] = Field(min_length=1, description="JSON list of reward models with their sections")
    batch_size: int = Field(8, ge=1, description="hardware: texts per forward pass on each GPU")


def main(arguments: Arguments) -> None:
    """Score with one reward model after the other, write the table."""
    device = distributed.init()
    answers = checked.read(arguments.answers, ANSWERS).collect()
    instructions = [join_instruction(*row) for row in answers.select("instruction", "input").iter_rows()]
    parts, counts = [], dict[str, int]()
    for scorer in arguments.scorers:
        sentences = principles.to_measure(scorer.principles, scorer.dimensions, scorer.rl_principles)
        tokenizer, settings = load_tokenizer(scorer.tokenizer), scorer.settings
        template = encoding.read_template(tokenizer, settings.template, scorer.scoring, "scoring.format")
        model = models.load_reward_model(scorer.model, scorer.folder, device, trainable=False)
        cut: dict[str, set[int]] = {}  # texts cut under any principle
        texts = [
            reward_model.reward_text_tokens(
                tokenizer,
                template,
                instructions,
                answers["response"].to_list(),
                [[sentence]] * len(answers),
                query_length=settings.query_length,
                response_length=settings.response_length,
                max_length=settings.max_length,
                keys="reward_model.",
                cut=cut,
            )
            for sentence in sentences.values()
        ]
        groups = [list(group) for group in zip(*texts, strict=True)]  # each answer's texts share a beginning
        score = partial(reward_model.score_alike, model, batch_size=arguments.batch_size, device=device)
        scores = distributed.over_ranks(groups, score).double().numpy()
        for (name, negated), column in zip(sentences, scores.T, strict=True):
            log.info("%s, %s%s: mean %.3f", scorer.name, name, ", negated" * negated, np.mean(column))
            parts.append(
                answers.select(
                    "prompt_id",
                    reward_model=pl.lit(scorer.name),
                    dimension=pl.lit(name),
                    opposite=pl.lit(negated),
                    score=pl.Series(column),
                )
            )
        del model
        counts |= {f"{scorer.name}: {what} cut": len(places) for what, places in cut.items()}
    if distributed.is_main():
        table = pl.concat(parts).select(list(SCORES.columns))
        origin = provenance.score_answers(arguments.answers, [dict(scorer) for scorer in arguments.scorers])
        log.info("%s", ", ".join(f"{what} {number}" for what, number in counts.items()))
        manifest = origin.manifest(origin.identify(), {"scores": len(table), **counts})
        artifacts.write_table(table, arguments.output, SCORES, manifest)
    distributed.barrier()
    distributed.leave()


if __name__ == "__main__":
    script.run(main, Arguments)
