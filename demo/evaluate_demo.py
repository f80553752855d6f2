"""Measure every stage of the demo against the oracles of `oracles.py`, on held-out instructions.

Templates and subjects are held out: no training instruction has the words of these instructions or asks for their
subjects. The measurements follow the stages: the judge; the reward model under single principles, plain and negated;
and one reward model's view of policies whose runs differ in their principles.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from pydantic import Field

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow_scripts")]

from demo import oracles, report, world  # noqa: E402
from salmon import (  # noqa: E402
    aggregation,
    artifacts,
    config,
    distributed,
    encoding,
    figures,
    likelihood,
    models,
    principles,
    provenance,
    randomness,
    reward_model,
    script,
)
from salmon.errors import UserError  # noqa: E402
from salmon.judging import Judge, Pair  # noqa: E402
from salmon.sampling import Sampler, TransformersSampler  # noqa: E402
from salmon.tokenizers import load_tokenizer  # noqa: E402

log = logging.getLogger("salmon.evaluate_demo")

BATCH = 64  # number of texts scored at once
SAMPLED = 1000  # number of prompts sampled at once: all
SHOWN = 12  # number of instructions whose answers are in the report
# These are not settings, but inputs or hardware.
OTHER_OPTIONS = {"output", "reward_model", "pmp", "policies", "threads"}
LISTS = ("words", "shown")  # values of every answer, or of some
Judgements = Sequence[Sequence[tuple[float, float]] | None]


class Arguments(script.Arguments):
    """Measure the demo against the oracles. Without reward model and policies, measure only its judge."""

    output: Path = Field(description="folder to write: evaluation.json, evaluation.md, pictures and pages")
    model: config.Model = Field(description="section of the configuration")
    policy_prompt: config.PolicyPrompt = Field(description="section of the configuration")
    judge: config.Judge = Field(description="section of the configuration")
    aggregation: config.Aggregation = Field(description="section of the configuration")
    ppo: config.Ppo = Field(description="section of the configuration")
    reward_settings: config.RewardModel | None = Field(None, description="section reward_model of the configuration")
    scoring: config.Scoring = Field(config.Scoring(), description="section of the configuration")
    reward_model: Path | None = Field(None, description="folder of the reward model")
    pmp: Path | None = Field(None, description="folder of the reward model before the training with principles")
    policies: script.JsonList[Path] = Field([], description="folders of policies, named RUN/policy")
    pairs: int = Field(96, ge=1, description="number of pairs of the initial policy's answers to judge")
    split: world.Split = Field("held_out", description="split of instructions and subjects")
    seed: int = Field(0, description="seed of the sampling and of the order of instructions")
    threads: int = Field(2, ge=1, description="CPU threads")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to an instruction: the prompt's tokens, its own tokens, its text, and whether it ended by itself."""

    prompt: list[int]
    tokens: list[int]
    text: str
    finished: bool


def draw_instructions(count: int, split: world.Split, seed: int) -> list[world.Instruction]:
    """Instructions of a split, in random order, each about equally often."""
    known = world.instructions(split)
    rng = randomness.rng("demo evaluation", seed)
    return [known[index] for _ in range(-(-count // len(known))) for index in rng.permutation(len(known))][:count]


def sample(
    arguments: Arguments, sampler: Sampler, tokenizer: Any, instructions: Sequence[str], name: str
) -> list[Answer]:
    """An answer to every instruction, at the temperature of RL."""
    preamble = encoding.read_preamble(arguments.policy_prompt)
    prompts = [encoding.encode_prompt(tokenizer, text, arguments.policy_prompt, preamble) for text in instructions]
    answers = sampler.sample(
        prompts,
        [randomness.seed_of("demo evaluation", arguments.seed, name, row) for row in range(len(prompts))],
        max_new_tokens=[arguments.ppo.response_length] * len(prompts),
        temperature=arguments.ppo.temperature,
        stop=arguments.policy_prompt.stop,
    )
    return [
        Answer(prompt, answer.tokens, answer.text, answer.finish_reason != "length")
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def judge_accuracy(
    pairs: Sequence[Pair], judgements: Judgements, dimensions: Sequence[str]
) -> dict[str, dict[str, float]]:
    """For each dimension: how often the oracle sees a difference, how often both orders then agree, and are right."""
    accuracy: dict[str, dict[str, float]] = {}
    for place, dimension in enumerate(dimensions):
        differing, agreeing, right = 0, 0, 0
        for pair, judged in zip(pairs, judgements, strict=True):
            difference = oracle_difference(pair, dimension)
            if judged is None or difference == 0:
                continue
            s12, s21 = judged[place]
            differing += 1
            agreeing += s12 * s21 > 0
            right += s12 * s21 > 0 and (s12 > 0) == (difference > 0)
        accuracy[dimension] = {
            "pairs": differing,
            "orders_agree": agreeing / max(1, differing),
            "right": right / max(1, agreeing),
        }
    return accuracy


def oracle_difference(pair: Pair, dimension: str) -> float:
    """The oracle's advantage of output 1; 0 if it is within `oracles.MARGIN`."""
    oracle = oracles.ORACLES[dimension]
    difference = oracle(pair.instruction, pair.output_1) - oracle(pair.instruction, pair.output_2)
    return difference if abs(difference) > oracles.MARGIN else 0.0


class RewardReader:
    """Scores pairs with a reward model."""

    def __init__(
        self,
        folder: Path,
        model: config.Model,
        settings: config.RewardModel,
        scoring: config.Scoring,
        tokenizer: Any,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.template = encoding.read_template(tokenizer, settings.template, scoring, "scoring.format")
        self.tokenizer, self.device = tokenizer, device
        self.model = models.load_reward_model(model, folder, device, trainable=False)

    def margins(self, pairs: Sequence[Pair], definitions: Sequence[Sequence[str]]) -> list[float]:
        """Reward of output 1 minus reward of output 2, for every pair under its own principles."""
        tokens = self._tokens(
            [pair for pair in pairs for _ in range(2)],
            [output for pair in pairs for output in (pair.output_1, pair.output_2)],
            [shown for shown in definitions for _ in range(2)],
        )
        first, second = reward_model.score(self.model, tokens, BATCH, self.device).view(-1, 2).T
        return [float(margin) for margin in first - second]

    def all_margins(self, pairs: Sequence[Pair], definitions: Sequence[str]) -> npt.NDArray[np.float64]:
        """The same for every pair under each principle alone: [pairs, definitions]."""
        groups = [
            self._tokens([pair] * len(definitions), [output] * len(definitions), [[one] for one in definitions])
            for pair in pairs
            for output in (pair.output_1, pair.output_2)
        ]
        rewards = reward_model.score_alike(self.model, groups, BATCH, self.device).numpy().astype(np.float64)
        return rewards[0::2] - rewards[1::2]

    def _tokens(
        self, pairs: Sequence[Pair], outputs: Sequence[str], definitions: Sequence[Sequence[str]]
    ) -> list[list[int]]:
        return reward_model.reward_text_tokens(
            self.tokenizer,
            self.template,
            [pair.instruction for pair in pairs],
            outputs,
            definitions,
            query_length=self.settings.query_length,
            response_length=self.settings.response_length,
            max_length=self.settings.max_length,
            keys="reward_model.",
        )


def reward_accuracy(
    reader: RewardReader, pairs: Sequence[Pair], judged: Sequence[principles.JudgedPrinciple]
) -> dict[str, dict[str, float]]:
    """For each dimension, if the oracle sees a difference: right by the principle alone, plain and negated."""
    accuracy = {}
    definitions = [one for principle in judged for one in (principle.definition, principle.negative_definition)]
    margins = reader.all_margins(pairs, definitions)
    for place, principle in enumerate(judged):
        differences = np.array([oracle_difference(pair, principle.dimension) for pair in pairs])
        seen = differences != 0
        plain, negated, wanted = margins[seen, 2 * place], margins[seen, 2 * place + 1], differences[seen]
        accuracy[principle.dimension] = {
            "pairs": int(seen.sum()),
            "plain": share(plain * wanted > 0),
            "negated": share(negated * wanted < 0),
            "flips": share(plain * negated < 0),
        }
    return accuracy


def share(values: Any) -> float:
    """Share of true values; 0 without values."""
    known = list(values)
    return float(np.mean(known)) if known else 0.0


def sign_flips(
    reader: RewardReader,
    pairs: Sequence[Pair],
    judgements: Judgements,
    judged: Sequence[principles.JudgedPrinciple],
    aggregation_settings: config.Aggregation,
) -> dict[str, float]:
    """Measure records drawn from held-out judgements as for training, with the deciding principle as drawn and negated.

    Returns:
        Their number; how often the reward model agrees with the judge on them; and how often it changes its preference
        when the deciding principle is negated and the others stay the same. For comparison, how often sums that need no
        reward model change sign: sums of the judge's scaled scores, which chose the deciding principle, and of the
        oracles' differences.
    """
    by_name = {principle.dimension: principle for principle in judged}
    shown = [by_name[name] for name in aggregation_settings.dimensions]
    places = [list(judged).index(principle) for principle in shown]
    usable = [(pair, scores) for pair, scores in zip(pairs, judgements, strict=True) if scores is not None]
    scores = np.array([[scores[place] for place in places] for _, scores in usable])  # [pairs, dimensions, 2]
    try:
        columns = [
            aggregation.scaled_scores(scores[:, column, 0], scores[:, column, 1], aggregation_settings.agreement)
            for column in range(len(shown))
        ]
    except ValueError:
        raise UserError("the judge has the same score for all pairs under a principle; measure more --pairs") from None
    scaled = np.stack(columns, axis=1)
    quiet = aggregation_settings.model_copy(
        update={
            "passes": 2,
            "label_noise": 0.0,
            "decision": "dominant",
            "refusal_probability": 0.0,
            "language_rule": False,
        }
    )
    used, wanted, definitions, turned, by_judge, by_oracle = [], [], [], [], [], []
    for number in range(quiet.passes):
        for (pair, _), row in zip(usable, scaled.tolist(), strict=True):
            traits = aggregation.Traits((False, False), None, (None, None))
            drawn = aggregation.draw_record(pair.prompt_id, number, row, traits, principles=shown, settings=quiet)
            if isinstance(drawn, str) or drawn.deciding is None:
                continue
            deciding = drawn.dimensions.index(drawn.deciding)
            principle = by_name[drawn.deciding]
            other = principle.definition if drawn.negated[deciding] else principle.negative_definition
            used.append(pair)
            wanted.append((1 if drawn.preference == 1 else -1) * (-1 if drawn.swapped else 1))
            definitions.append(drawn.definitions)
            turned.append([*drawn.definitions[:deciding], other, *drawn.definitions[deciding + 1 :]])
            differences = [
                oracle_difference(pair, name) * (-1 if negated else 1)
                for name, negated in zip(drawn.dimensions, drawn.negated, strict=True)
            ]
            by_judge.append(turns(drawn.scores, deciding))
            by_oracle.append(turns(differences, deciding))
    before, after = reader.margins(used, definitions), reader.margins(used, turned)
    return {
        "records": len(used),
        "agrees_with_judge": share(margin * sign > 0 for margin, sign in zip(before, wanted, strict=True)),
        "flips": share(first * second < 0 for first, second in zip(before, after, strict=True)),
        "flips_of_summed_judgements": share(by_judge),
        "flips_of_summed_oracles": share(by_oracle),
    }


def turns(parts: Sequence[float], place: int) -> bool:
    """Whether a sum changes its sign when one of its parts does."""
    total = sum(parts)
    return total * (total - 2 * parts[place]) < 0


def logprobs(model: torch.nn.Module, answers: Sequence[Answer], temperature: float) -> npt.NDArray[np.float64]:
    """Log probability of each answer, the sum over its tokens."""
    prompts, tokens = [answer.prompt for answer in answers], [answer.tokens for answer in answers]
    return likelihood.sequence_logprobs(model, prompts, tokens, temperature, BATCH)


def summarize(instructions: Sequence[str], answers: Sequence[Answer], kl: float) -> dict[str, Any]:
    """Oracles' scores (means, of 100), words, tokens, and the number of answers that ended by themselves."""
    scores = [oracles.score(text, answer.text) for text, answer in zip(instructions, answers, strict=True)]
    words = [len(answer.text.split()) for answer in answers]
    return {
        "oracles": {name: 100 * float(np.mean([score[name] for score in scores])) for name in oracles.ORACLES},
        "words": words,
        "mean_words": float(np.mean(words)),
        "mean_tokens": float(np.mean([len(answer.tokens) for answer in answers])),
        "finished": float(np.mean([answer.finished for answer in answers])),
        "kl": kl,
        "shown": [answers[place].text for place in shown(len(answers))],
    }


def shown(number: int) -> range:
    """Indices of the instructions whose answers are in the report, of all kinds."""
    return range(0, number, max(1, number // SHOWN))


def measure_judge(
    arguments: Arguments,
    model: torch.nn.Module,
    sampler: Sampler,
    tokenizer: Any,
    judged: Sequence[principles.JudgedPrinciple],
) -> tuple[list[Pair], Judgements]:
    """Pairs of the initial policy's own answers, and its judgements of them."""
    judge = Judge(
        model,
        tokenizer,
        template=encoding.read_template(tokenizer, arguments.judge.template, arguments.judge, "judge.format"),
        principles=judged,
        max_length=arguments.judge.max_length,
        device=next(model.parameters()).device,
    )
    questions = [
        instruction.text for instruction in draw_instructions(arguments.pairs, arguments.split, arguments.seed)
    ]
    outputs = [sample(arguments, sampler, tokenizer, questions, name) for name in ("first", "second")]
    pairs = [
        Pair(str(row), text, first.text, second.text)
        for row, (text, first, second) in enumerate(zip(questions, *outputs, strict=True))
    ]
    return pairs, [one for start in range(0, len(pairs), BATCH) for one in judge.judge(pairs[start : start + BATCH])]


def measure_policies(arguments: Arguments, model: Any, sampler: Sampler, tokenizer: Any) -> dict[str, Any]:
    """Answers of the initial policy and of each trained one to the same instructions; loads adapters on the model."""
    texts = [instruction.text for instruction in world.instructions(arguments.split)]
    summaries = {"initial": summarize(texts, sample(arguments, sampler, tokenizer, texts, "policies"), 0.0)}
    for number, folder in enumerate(arguments.policies):
        run = folder.parent.name
        if number:
            model.load_adapter(str(folder), run)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=run)
        model.set_adapter(run)
        sampler.sync(model.eval())
        answers = sample(arguments, sampler, tokenizer, texts, "policies")
        own = logprobs(model, answers, arguments.ppo.temperature)
        with model.disable_adapter():
            before = logprobs(model, answers, arguments.ppo.temperature)
        summaries[run] = summarize(texts, answers, float(np.mean(np.subtract(own, before))))
        log.info("policy %s: %s", run, {name: value for name, value in summaries[run].items() if name not in LISTS})
    return summaries


def main(arguments: Arguments) -> None:
    """Sample, judge, score, compare, write."""
    if arguments.judge.model:
        raise UserError("the demo's evaluation measures the initial policy as its judge; set judge.model to null")
    device = distributed.init()
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(arguments.model)
    model = models.load_initial_policy(arguments.model, device)
    sampler = TransformersSampler(tokenizer, device, batch_size=SAMPLED, model=model)
    judged = principles.read_judged(arguments.judge.principles)
    pairs, judgements = measure_judge(arguments, model, sampler, tokenizer, judged)
    results: dict[str, Any] = {"judge": judge_accuracy(pairs, judgements, [one.dimension for one in judged])}
    log.info("judge: %s", {name: round(numbers["right"], 2) for name, numbers in results["judge"].items()})
    if arguments.reward_model:
        if arguments.reward_settings is None:
            raise UserError("--reward-model needs --reward-settings")
        # The model before the training with principles is only for comparison: a third of the pairs is enough.
        some = pairs[: -(-len(pairs) // 3)]
        for name, folder, used in (("pmp", arguments.pmp, some), ("reward_model", arguments.reward_model, pairs)):
            if folder is None:
                continue
            reader = RewardReader(
                folder, arguments.model, arguments.reward_settings, arguments.scoring, tokenizer, device
            )
            results[name] = reward_accuracy(reader, used, judged)
            for kind in ("plain", "negated", "flips"):
                log.info("%s, %s: %s", name, kind, {one: round(each[kind], 2) for one, each in results[name].items()})
        results["sign_flips"] = sign_flips(reader, pairs, judgements, judged, arguments.aggregation)
        log.info("reward model, drawn records: %s", results["sign_flips"])
    results["policies"] = measure_policies(arguments, model, sampler, tokenizer)
    results = {"headline": report.headline(results), **results}
    instructions = [instruction.text for instruction in world.instructions(arguments.split)]
    asked = [instructions[place] for place in shown(len(instructions))]
    answers = {name: summary.pop("shown") for name, summary in results["policies"].items()}
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        artifacts.write_json(folder / "evaluation.json", results)
        (folder / "evaluation.md").write_text(report.markdown([results]), encoding="utf-8")
        report.part(results).write(folder)
        (folder / "samples.html").write_text(figures.samples(asked, answers).page(), encoding="utf-8")
        origin = provenance.evaluate_demo(
            arguments.reward_model,
            arguments.pmp,
            arguments.policies,
            settings={name: value for name, value in arguments if name not in OTHER_OPTIONS},
        )
        counts = {"pairs": len(pairs), "instructions": len(results["policies"]["initial"]["words"])}
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), counts))
    log.info("%s", results["headline"])
    distributed.leave()


if __name__ == "__main__":
    script.run(main, Arguments)
