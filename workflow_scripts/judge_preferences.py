"""Judge one shard of the pairs (response0, response1) by every principle, in both orders.

Reference step 1, paper section 3.2; see `salmon/judging.py` for the judge. response0 is output_1.
"""

import logging
from pathlib import Path

import polars as pl
from pydantic import Field

from salmon import (
    checked,
    config,
    distributed,
    encoding,
    judging,
    models,
    principles,
    provenance,
    resuming,
    script,
    shards,
    templates,
)
from salmon.config import Model
from salmon.errors import UserError
from salmon.judging import Judge, Pair
from salmon.tables import JUDGEMENTS, RESPONSES
from salmon.tokenizers import load_tokenizer
from salmon.work import WorkFolder

log = logging.getLogger(__name__)

KEPT = {**JUDGEMENTS.schema, "cut": pl.Boolean()}
"""Columns of the rows kept until the shard is complete; they include whether the judge's outputs were cut."""


class Arguments(script.Arguments):
    """Judge one shard of the pairs (response0, response1) by every principle, in both orders."""

    response0: Path = Field(description="responses of the first sampling (parquet)")
    response1: Path = Field(description="responses of the second sampling (parquet)")
    principles: Path = Field(description="JSON list of dimension, definition, negative_definition")
    output: Path = Field(description="judgements of the shard (parquet); its manifest is written next to it")
    shard: int = Field(ge=0, description="which of judge.shards, from 0: row i of response0 is in shard i % shards")
    model: Model = Field(description="section of the configuration")
    judge: config.Judge = Field(description="section of the configuration")
    batch_size: int = Field(4, ge=1, description="pairs at a time on a GPU; only speed and memory depend on it")
    tensor_parallel: bool = Field(False, description="hardware: all GPUs of the job share one model")
    common: bool = Field(
        False, description="prompts that only one of the files has are counted and left out; without this, refused"
    )


def main(arguments: Arguments) -> None:
    """Judge the pairs that an earlier run has not judged, write the manifest and then the table."""
    device = distributed.init()
    origin = origin_of(arguments)
    inputs = origin.identify()
    judged = principles.read_judged(arguments.principles)
    table, in_one_file = read_shard(arguments)
    pairs, counts = judging.select_pairs(table, arguments.judge)
    if in_one_file:
        counts.update(pairs=in_one_file, not_answered_by_both=in_one_file)

    work = WorkFolder(arguments.output)
    if work.open(origin.fingerprint(inputs)):
        distributed.leave()
        return
    left = resuming.left_to_do(work, [pair.prompt_id for pair in pairs], KEPT)
    if left:
        tokenizer = load_tokenizer(arguments.model)
        template = encoding.read_template(tokenizer, arguments.judge.template, arguments.judge, "judge.format")
        templates.check_slots(template.text, arguments.judge.template, templates.JUDGE_SLOTS, "judge.template")
        model = models.load_judge(arguments.model, device, together=arguments.tensor_parallel)
        models.check_context(model, arguments.judge.max_length, "judge.max_length")
        judge = Judge(
            model,
            tokenizer,
            template=template,
            principles=judged,
            max_length=arguments.judge.max_length,
            device=device,
        )
        proof = judging.prove(judge)
        judge.way = proof.way
        log.info("judging %s: %s", proof.way, proof.differences)

    def compute(rows: list[int]) -> pl.DataFrame:
        batch = [pairs[row] for row in rows]
        unfit = [(None, None)] * len(judged)
        # A pair that does not fit gets rows without scores, which mark it as processed.
        lines = [
            (pair.prompt_id, principle.dimension, *score, pair.prompt_id in judge.cut)
            for pair, scores in zip(batch, judge.judge(batch), strict=True)
            for principle, score in zip(judged, scores or unfit, strict=True)
        ]
        return pl.DataFrame(lines, schema=KEPT, orient="row")

    lengths = {row: sum(map(len, (pairs[row].instruction, pairs[row].output_1, pairs[row].output_2))) for row in left}
    resuming.run_batches(work, lengths, arguments.batch_size, compute, "pairs", together=arguments.tensor_parallel)
    if distributed.is_main():
        judgements = sort_judgements(work.read_parts(KEPT), pairs, [principle.dimension for principle in judged])
        whole = judgements.drop_nulls()
        counts["no_room"] = (judgements.height - whole.height) // len(judged)
        counts["judged"] = len(pairs) - counts["no_room"]
        counts["cut"] = whole.filter("cut")["prompt_id"].n_unique()  # of the judged pairs
        counts["rows"] = whole.height
        resuming.write_shard(work, whole.drop("cut"), JUDGEMENTS, origin.manifest(inputs, counts))
    distributed.leave()


def origin_of(arguments: Arguments) -> provenance.Origin:
    """The settings that affect the judgements of the shard."""
    return provenance.judge_preferences(
        arguments.response0,
        arguments.response1,
        arguments.principles,
        arguments.shard,
        model=arguments.model,
        judge=arguments.judge,
    )


def read_shard(arguments: Arguments) -> tuple[pl.DataFrame, int]:
    """The rows of response0 that belong to the shard, each with its partner of response1.

    Returns:
        The table RESPONSES, in the order of response0, plus response_1 and finish_reason_1; and, with `common`, the
        number of prompts that only one of the two files has.

    Raises:
        UserError: if the two files have different prompts.
    """
    first = checked.read(arguments.response0, RESPONSES)
    second = checked.read(arguments.response1, RESPONSES)
    key = ["prompt_id", "instruction", "input"]
    in_one_file = 0
    for one, other, here, there in (
        (first, second, arguments.response0, arguments.response1),
        (second, first, arguments.response1, arguments.response0),
    ):
        if arguments.common:
            in_one_file += one.join(other, on="prompt_id", how="anti").select(pl.len()).collect().item()
        mine = one.join(other, on="prompt_id", how="semi") if arguments.common else one
        alone = mine.join(other, on=key, how="anti").select("prompt_id").collect()["prompt_id"]
        if len(alone):
            raise UserError(
                f"{here} and {there} have different prompts: {len(alone)} of the first are not in the second, or have "
                f"another text there, such as prompt_id {min(alone)}; build both again from one table of prompts"
            )
    of_shard = shards.rows_of(first, arguments.shard, arguments.judge.shards)
    return judging.with_partners(of_shard, second), in_one_file


def sort_judgements(judgements: pl.DataFrame, pairs: list[Pair], dimensions: list[str]) -> pl.DataFrame:
    """The judgements in the order of the pairs and, within a pair, of the principles."""
    keys = pl.DataFrame(
        [(pair.prompt_id, dimension) for pair in pairs for dimension in dimensions],
        schema=JUDGEMENTS.select("prompt_id", "dimension"),
        orient="row",
    )
    return shards.in_order(judgements, keys)


if __name__ == "__main__":
    script.run(main, Arguments)
