"""Have a model behind an OpenAI-compatible endpoint compare a policy's answers with the initial policy's.

It judges in both orders. Each verdict is kept as it arrives: a killed job asks only for the others.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import polars as pl
from pydantic import Field

from salmon import artifacts, checked, endpoint, evaluation, mt_bench, provenance, script, templates
from salmon.config import Evaluation
from salmon.endpoint import Comparison, Endpoint, Refused
from salmon.errors import UserError
from salmon.tables import ANSWERS, VERDICTS
from salmon.text import join_instruction
from salmon.work import WorkFolder

log = logging.getLogger("salmon.judge_by_endpoint")

Key = tuple[str, str, bool]
ALL_REFUSED = 20  # comparisons: if all of the first ones are refused, the others would be, too


class Arguments(script.Arguments):
    """Have a model behind an endpoint judge answers."""

    answers: Path | None = Field(None, description="answers of the policy (parquet), if any")
    initial_answers: Path | None = Field(None, description="answers of the initial policy (parquet)")
    mt_bench: Path | None = Field(None, description="folder of the policy's answers to MT-Bench, if any")
    initial_mt_bench: Path | None = Field(None, description="folder of the initial policy's answers to MT-Bench")
    output: Path = Field(description="verdicts (parquet); their manifest is written next to them")
    evaluation: Evaluation = Field(description="section of the configuration")


def main(arguments: Arguments) -> None:
    """Ask for the missing verdicts, write the table."""
    settings = arguments.evaluation.judge_endpoint
    if settings is None:
        raise UserError("evaluation.judge_endpoint does not name an endpoint")
    template = templates.read(settings.template)
    needed = templates.ENDPOINT_SLOTS
    templates.check_slots(template, settings.template, needed, "evaluation.judge_endpoint.template")
    origin = provenance.judge_by_endpoint(
        arguments.answers,
        arguments.initial_answers,
        arguments.mt_bench,
        arguments.initial_mt_bench,
        evaluation=arguments.evaluation,
    )
    inputs = origin.identify()
    pairs = {(pair.kind, pair.prompt_id): pair for pair in comparisons(arguments)}
    if not pairs:
        raise UserError("there is nothing to judge: no prompt was answered by both policies")
    work = WorkFolder(arguments.output)
    if work.open(origin.fingerprint(inputs), alone=True):
        return
    wanted = [(*key, first) for key in pairs for first in (True, False)]
    done = set(work.read_parts(VERDICTS.schema).select(VERDICTS.key).iter_rows())
    left = [key for key in wanted if key not in done]
    refused: dict[Key, str] = {}
    if left:
        log.info("%d of %d comparisons remain", len(left), len(wanted))
        refused = ask_all(Endpoint(settings), template, pairs, left, work, settings.max_refused * len(wanted))
    lost = pl.DataFrame([(*key, None, reason) for key, reason in refused.items()], schema=VERDICTS.schema, orient="row")
    rows = pl.concat([work.read_parts(VERDICTS.schema), lost]).sort(VERDICTS.key)
    found, reasons = Counter(rows["preferred"].to_list()), Counter(refused.values())
    counts = {"comparisons": len(wanted), "unreadable": found[None] - len(refused), "refused": len(refused)}
    counts |= {f"refused: {reason}": number for reason, number in sorted(reasons.items())}
    answered = 2 * sum(pair.policy != pair.initial for pair in pairs.values()) - len(refused)
    if counts["unreadable"] > answered / 2:
        raise UserError(
            f"{counts['unreadable']} of {answered} answers of {settings.model} have no line such as `Verdict: A`: fix "
            "evaluation.judge_endpoint.template, or allow more tokens in evaluation.judge_endpoint.options"
        )
    log.info("%s", ", ".join(f"{name or 'no verdict'} {number}" for name, number in found.most_common()))
    for kind, one in evaluation.verdict_wins(rows, arguments.evaluation.seed).items():
        won = one["won"]
        if won["value"] is not None:
            shares = (won["value"], won["low"], won["high"], won["number"])
            log.info("%s: the policy's answer is preferred in a share of %.2f (%.2f to %.2f) of %d", kind, *shares)
    if refused:
        log.warning("refused: %s", ", ".join(f"{reason} {number}" for reason, number in reasons.most_common()))
    with work.finish(origin.manifest(inputs, counts | {"verdicts": len(rows)})) as file:
        artifacts.write_table(rows, file, VERDICTS)


def comparisons(arguments: Arguments) -> Iterator[Comparison]:
    """The comparisons to make."""
    if arguments.answers and arguments.initial_answers:
        answers, initial = (
            checked.read(path, ANSWERS).collect() for path in (arguments.answers, arguments.initial_answers)
        )
        others = dict(initial.select("prompt_id", "response").iter_rows())
        for row in answers.iter_rows(named=True):
            if row["prompt_id"] in others:
                instruction = join_instruction(row["instruction"], row["input"])
                yield Comparison("prompts", row["prompt_id"], instruction, row["response"], others[row["prompt_id"]])
    if arguments.mt_bench and arguments.initial_mt_bench and arguments.evaluation.mt_bench:
        policy, initial_policy = (
            [answer for file in sorted(folder.glob("*.jsonl")) for answer in mt_bench.read_answers(file)]
            for folder in (arguments.mt_bench, arguments.initial_mt_bench)
        )
        questions = mt_bench.read_questions(Path(arguments.evaluation.mt_bench))
        yield from endpoint.dialogues(questions, policy, initial_policy)


def ask_all(
    judge: Endpoint,
    template: str,
    pairs: dict[tuple[str, str], Comparison],
    left: list[Key],
    work: WorkFolder,
    most_refused: float,
) -> dict[Key, str]:
    """Ask for verdicts, and keep each as it arrives.

    Returns:
        The refused comparisons, with reasons. They are not kept: a killed job asks for them again.

    Raises:
        UserError: for the first request that failed for good, after those under way have ended and are kept; or if more
            than `most_refused` are refused.
    """

    def verdict(key: Key) -> Refused | None:
        kind, prompt_id, first = key
        pair = pairs[kind, prompt_id]
        if pair.policy == pair.initial:
            found: str | None = "tie"
        else:
            try:
                said = judge.ask(endpoint.request_text(template, pair, policy_first=first))
            except Refused as refusal:
                return refusal
            found = endpoint.preferred(endpoint.read_verdict(said), policy_first=first)
        reason = None if found else endpoint.UNREADABLE
        work.write_part(pl.DataFrame([(*key, found, reason)], schema=VERDICTS.schema, orient="row"))
        return None

    refused: dict[Key, str] = {}
    with ThreadPoolExecutor(judge.settings.max_requests) as pool:
        asked = {pool.submit(verdict, key): key for key in left}
        try:
            done = script.progress(as_completed(asked), total=len(asked), what="verdicts")
            for number, future in enumerate(done, start=1):
                if refusal := future.result():
                    refused[asked[future]] = refusal.reason
                if refusal and (len(refused) > most_refused or len(refused) == number == ALL_REFUSED):
                    raise UserError(
                        f"{len(refused)} comparisons were refused so far, but at most a share of "
                        f"{judge.settings.max_refused:g} may be (evaluation.judge_endpoint.max_refused); the last one: "
                        f"{refusal.advice}"
                    )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return refused


if __name__ == "__main__":
    script.run(main, Arguments)
