"""The work of each stage: rows, tokens and passes, counted on the tables that exist.

For a table that does not exist yet, the section `plan` assumes the number of rows and the lengths of texts. Splits,
steps and passes come from the functions that the stages themselves call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import polars as pl
from transformers import PreTrainedTokenizerBase

from salmon import batching, checked, judging, ppo, reward_model, sft, training
from salmon.assumptions import Assumptions, TableName
from salmon.config import PolicyPrompt, RewardTraining, Training
from salmon.configuration import Config
from salmon.encoding import prompt_text, read_preamble, read_template, shared_tokens, tokenize
from salmon.errors import UserError
from salmon.judging import Judge
from salmon.margins import common_prefix
from salmon.principles import draw_principles, read_judged, read_weighted
from salmon.randomness import rng
from salmon.tables import RESPONSES, RL_PROMPTS, SFT_EXAMPLES
from salmon.text import join_instruction

SHOWN_STEPS = 16
"""Number of PPO steps on which reward texts and passes are counted; tokens of queries are counted on all steps."""

OF_A_CHAT = 20
"""Tokens that a chat template is assumed to add to an instruction if no tokenizer is available."""


@dataclass(frozen=True)
class Work:
    """The work of a stage, over all of its jobs.

    Attributes:
        rows: number of prompts, pairs, rollouts, or training records (each counted as often as it is used).
        tokens: tokens that the model reads, without padding, in one pass over all rows.
        answers: tokens that are sampled.
        scored: tokens that the reward model reads in RL.
        length: mean length of a text in tokens.
        longest: largest length of a text in tokens.
        prompt: largest number of tokens read before the first token is sampled.
        steps: steps of the optimiser's outer loop; 0 if nothing is trained.
        passes: a rank's passes with gradients over all rows; batches if nothing is trained.
        forward_passes: a rank's passes of one model without gradients.
        counted: whether rows and lengths come from a table rather than from assumptions.
    """

    rows: int
    tokens: int
    answers: int = 0
    scored: int = 0
    length: float = 0.0
    longest: int = 0
    prompt: int = 0
    steps: int = 0
    passes: int = 0
    forward_passes: int = 0
    counted: bool = True


@dataclass(frozen=True)
class Counter:
    """Counts the work of one run's stages.

    Attributes:
        config: configuration of the run.
        assumed: the section `plan`.
        tokenizer: tokenizer of the models; without one (None), a token is assumed to have four characters.
    """

    config: Config
    assumed: Assumptions
    tokenizer: PreTrainedTokenizerBase | None

    def sampling(self, prompts: Path, responses: Path, before: Path, batch_size: int) -> Work:
        """Work of sampling responses to prompts.

        Args:
            prompts: table of prompts, which need not exist.
            responses: table of responses, which need not exist; if it does, its lengths are used.
            before: table of an earlier sampling, whose mean length is used if there are no responses yet.
            batch_size: rows at a time, over all ranks of all jobs.
        """
        prompt, settings = self.config.policy_prompt, self.config.sampling
        lengths, counted = self._queries(prompts, prompt, "prompts")
        longest = self._shared(prompt) + settings.max_length
        fitting = [length for length in lengths if length < longest]
        each, known = self._answer(responses, before)
        answers = sum(min(each, longest - length) for length in fitting)
        if responses.is_file():
            found = checked.read(responses, RESPONSES).select("response_tokens").collect()
            answers = int(found["response_tokens"].sum())
        return Work(
            rows=len(fitting),
            tokens=sum(fitting),
            answers=answers,
            length=(sum(fitting) + answers) / max(1, len(fitting)),
            longest=longest,
            prompt=max(fitting, default=0) if counted else longest // 2,
            passes=-(-len(fitting) // batch_size),
            counted=counted and known,
        )

    def judging(self, prompts: Path, responses: tuple[Path, Path], batch_size: int) -> Work:
        """Work of judging both orders of each pair under each principle; common prefixes are computed once.

        Args:
            prompts: table of prompts, which gives the number of pairs if there are no responses yet.
            responses: both tables of responses, which need not exist.
            batch_size: pairs at a time, over all ranks of all jobs.
        """
        settings = self.config.judge
        principles = read_judged(settings.principles)
        lengths: list[int] = []
        counted = all(path.is_file() for path in responses) and self.tokenizer is not None
        tails = [self._count(principle.dimension + principle.definition) for principle in principles]
        if counted and self.tokenizer:
            template = read_template(self.tokenizer, settings.template, settings, "judge.format")
            judge = Judge(
                None,  # type: ignore[arg-type]  # it only encodes
                self.tokenizer,
                template=template,
                principles=principles,
                max_length=settings.max_length,
                device="cpu",
            )
            first, second = (checked.read(path, RESPONSES) for path in responses)
            for pair in judging.select_pairs(judging.with_partners(first, second), settings)[0]:
                if prompts_of := judge.encode(pair):
                    lengths += [packed(prompts_of.order_12), packed(prompts_of.order_21)]
        else:
            rows, _ = self._rows(prompts, "prompts")
            head = self._count(Path(settings.template).read_text(encoding="utf-8")) + self.assumed.instruction_tokens
            head = min(head + 2 * self._answer(*responses)[0], settings.max_length)
            lengths = [head + sum(tails)] * 2 * rows
        pairs = len(lengths) // 2
        return Work(
            rows=pairs,
            tokens=sum(lengths),
            length=fmean(lengths or [0]),
            longest=settings.max_length + sum(sorted(tails)[:-1]),
            passes=2 * -(-pairs // batch_size),
            counted=counted,
        )

    def sft(self, examples: Path, budget: int, ranks: int) -> Work:
        """Work of SFT on instructions with answers."""
        settings = self.config.sft
        if examples.is_file() and self.tokenizer:
            columns = ("example_id", "prompt_id", "instruction", "input", "output", "is_whole")
            table = checked.read(examples, SFT_EXAMPLES, columns).sort("example_id").collect()
            texts = ((join_instruction(row[2], row[3]), row[4], row[5]) for row in table.iter_rows())
            found = sft.encode(self.tokenizer, texts, self.config.policy_prompt, settings.max_length)
            usable = [(place, example) for place, example in enumerate(found) if example]
            rows = table[[place for place, _ in usable]].select("prompt_id")
            lengths, counted = [len(example.tokens) for _, example in usable], True
        else:
            number, _ = self._rows(examples, "sft_data")
            each = self._shared(self.config.policy_prompt) + self.assumed.instruction_tokens
            lengths = [min(each + self.assumed.response_tokens, settings.max_length)] * number
            rows, counted = _made_up(number), False
        return _trained(settings, rows, lengths, lengths, sft.NAME, budget, ranks, counted)

    def reward(self, records: Path, stage: str, responses: Path, judged: int, budget: int, ranks: int) -> Work:
        """Work of training or pre-training the reward model.

        Args:
            records: table of records, which need not exist.
            stage: `pmp` or `reward_model`.
            responses: table of responses, which need not exist; it gives the lengths of outputs without records.
            judged: number of judged pairs, from which the records are made.
            budget: tokens per pass.
            ranks: number of ranks of the job.
        """
        settings: RewardTraining = getattr(self.config, stage)
        if records.is_file() and self.tokenizer:
            table, _ = reward_model.read_records(records)
            template = read_template(self.tokenizer, settings.template, self.config.scoring, "scoring.format")
            of_texts: list[int] = []
            for part in table.iter_slices(512):
                texts = reward_model.record_tokens(self.tokenizer, template, part, settings, stage)
                of_texts += map(len, texts)
            rows, counted = table.select("prompt_id"), True
        else:
            number = self.config.aggregation.passes * judged
            if stage == "pmp":
                number, _ = self._rows(records, "pmp_data")
            shown = 0 if stage == "pmp" else 1 / self.config.aggregation.geometric_p
            each = self._count(Path(settings.template).read_text(encoding="utf-8"))
            each += min(self.assumed.instruction_tokens, settings.query_length)
            answer = self.assumed.response_tokens if stage == "pmp" else self._answer(responses)[0]
            each += min(answer, settings.response_length) + int(shown * self._principle())
            of_texts = [min(each, settings.max_length)] * 2 * number
            rows, counted = _made_up(number), False
        sums = [one + other for one, other in zip(of_texts[::2], of_texts[1::2], strict=True)]
        rectangles = [2 * max(pair) for pair in zip(of_texts[::2], of_texts[1::2], strict=True)]
        return _trained(settings, rows, sums, rectangles, reward_model.NAME, budget, ranks, counted, texts=2)

    def rl(self, prompts: Path, responses: Path, budget: int, forward_budget: int, ranks: int) -> Work:
        """Work of PPO: sampling, measuring and scoring rollouts, and updating the models.

        Args:
            prompts: table of RL prompts, which need not exist.
            responses: the initial policy's responses; if they exist, rollouts are assumed to have their mean length.
            budget: tokens per pass with gradients.
            forward_budget: tokens per pass without gradients.
            ranks: number of ranks of the job.
        """
        settings, prompt = self.config.ppo, self.config.policy_prompt
        lengths, counted = self._queries(prompts, prompt, "rl_prompts")
        if not counted:  # longer prompts would not be used
            lengths = [min(length, settings.query_length) for length in lengths]
        fits = [row for row, length in enumerate(lengths) if length <= settings.query_length]
        table = checked.read(prompts, RL_PROMPTS).collect()[fits] if counted else None
        queries = [lengths[row] for row in fits]
        if settings.rollout_batch_size % ranks:
            raise UserError(f"ppo.rollout_batch_size {settings.rollout_batch_size} is not a multiple of {ranks} GPUs")
        steps = ppo.total_steps(len(queries), settings)
        answer, answer_is_known = self._answer(responses)
        answer = min(answer, settings.response_length)
        tokens = shown = scored = measured = updated = 0
        for step in range(steps):
            of_step = [queries[row] for row in ppo.rows_of_step(step, len(queries), settings)]
            tokens += sum(of_step)
            if step % -(-steps // SHOWN_STEPS):
                continue
            shown += 1
            whole = [length + answer for length in of_step]
            texts = self._scored(table, step, len(queries), answer)
            scored += sum(texts)
            measured += sum(len(batching.passes(each, forward_budget, ranks)) for each in (whole, whole, whole, texts))
            order = rng("ppo-minibatches", settings.seed, step, 0).permutation(len(whole))
            for start in range(0, len(order), settings.minibatch_size):
                part = [whole[place] for place in order[start : start + settings.minibatch_size]]
                updated += settings.inner_epochs * len(batching.passes(part, budget, ranks))
        rollouts = steps * settings.rollout_batch_size
        return Work(
            rows=rollouts,
            tokens=tokens,
            answers=rollouts * answer,
            scored=round(scored / shown * steps),
            length=tokens / rollouts + answer,
            longest=settings.query_length + settings.response_length,
            steps=steps,
            passes=round(updated / shown * steps),
            forward_passes=round(measured / shown * steps),
            counted=counted and answer_is_known,
        )

    def _scored(self, table: pl.DataFrame | None, step: int, prompts: int, answer: int) -> list[int]:
        """Tokens of each reward text of a step, for responses of `answer` tokens."""
        settings = self.config.ppo
        answer = min(answer, settings.reward_response_length)
        rows = ppo.rows_of_step(step, prompts, settings)
        if table is None or self.tokenizer is None:
            each = self._count(Path(settings.template).read_text(encoding="utf-8"))
            each += settings.principles_per_rollout * self._principle()
            each += min(self.assumed.instruction_tokens, settings.reward_query_length)
            return [min(each + answer, settings.reward_max_length)] * len(rows)
        principles = read_weighted(settings.principles)
        chosen = table[rows]
        template = read_template(self.tokenizer, settings.template, self.config.scoring, "scoring.format")
        drawn = [
            draw_principles(principles, question_type, settings, rng("ppo-principles", settings.seed, step, place))
            for place, question_type in enumerate(chosen["question_type"])
        ]
        texts = reward_model.reward_text_tokens(
            self.tokenizer,
            template,
            [join_instruction(*row) for row in chosen.select("instruction", "input").iter_rows()],
            [""] * len(chosen),
            [[principle.definition for principle in each] for each in drawn],
            query_length=settings.reward_query_length,
            response_length=settings.reward_response_length,
            max_length=settings.reward_max_length,
            keys="ppo.reward_",
        )
        return [min(len(text) + answer, settings.reward_max_length) for text in texts]

    def _answer(self, *responses: Path) -> tuple[int, bool]:
        """Mean tokens of a response from the first table that has them, and whether there is such a table."""
        for path in filter(Path.is_file, responses):
            found = checked.read(path, RESPONSES).select("response_tokens").collect()["response_tokens"].drop_nulls()
            if len(found):
                return round(fmean(found)), True
        return self.assumed.response_tokens, False

    def _queries(self, prompts: Path, prompt: PolicyPrompt, name: TableName) -> tuple[list[int], bool]:
        """Tokens of each prompt as the policy reads it, and whether they were counted."""
        if not (prompts.is_file() and self.tokenizer):
            each = self._shared(prompt) + self.assumed.instruction_tokens
            return [each] * self._rows(prompts, name)[0], False
        preamble = read_preamble(prompt)
        lengths: list[int] = []
        table = pl.scan_parquet(prompts).select("instruction", "input").collect()
        for part in table.iter_slices(4096):
            texts = [prompt_text(self.tokenizer, join_instruction(*row), prompt, preamble) for row in part.iter_rows()]
            lengths += map(len, tokenize(self.tokenizer, texts, add_special_tokens=not prompt.is_chat))
        return lengths, True

    def _rows(self, table: Path, name: TableName) -> tuple[int, bool]:
        """Number of rows of a table, counted or assumed, and whether it was counted."""
        if not table.is_file():
            return self.assumed.rows[name], False
        return int(pl.scan_parquet(table).select(pl.len()).collect().item()), True

    def _shared(self, prompt: PolicyPrompt) -> int:
        """Number of tokens at the beginning that all prompts of the policy share."""
        if self.tokenizer:
            return shared_tokens(self.tokenizer, prompt, read_preamble(prompt))
        return OF_A_CHAT if prompt.is_chat else self._count(read_preamble(prompt))

    def _principle(self) -> int:
        """Mean tokens of a principle's definition."""
        sentences = [principle.definition for principle in read_judged(self.config.judge.principles)]
        return round(fmean(map(self._count, sentences)))

    def _count(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(tokenize(self.tokenizer, [text])[0]) if self.tokenizer else -(-len(text) // 4)


def packed(prompts: Sequence[list[int]]) -> int:
    """Tokens of prompts with a common beginning, which is counted once (`margins`)."""
    head = common_prefix(prompts)
    return head + sum(len(prompt) - head for prompt in prompts)


def _made_up(rows: int) -> pl.DataFrame:
    """Rows that have only an id."""
    return pl.DataFrame({"prompt_id": [str(row) for row in range(rows)]}, schema={"prompt_id": pl.String()})


def _trained(
    settings: Training,
    rows: pl.DataFrame,
    lengths: Sequence[int],
    rectangles: Sequence[int],
    name: str,
    budget: int,
    ranks: int,
    counted: bool,
    texts: int = 1,
) -> Work:
    """Work of a training stage, with the split, order and passes of `training`.

    Args:
        settings: settings of the stage.
        rows: `prompt_id` of each row.
        lengths: tokens of each row, without padding.
        rectangles: tokens of each row, with padding.
        name: name of the random draws.
        budget: tokens per pass.
        ranks: number of ranks of the job.
        counted: whether the lengths come from a table.
        texts: number of texts per row.
    """
    if settings.batch_size % ranks:
        raise UserError(f"the batch_size {settings.batch_size} is not a multiple of the {ranks} training processes")
    train, held = training.split(rows.with_row_index("place"), settings.eval_examples, settings.seed, name)
    places = train["place"].to_list()
    order = training.training_order(len(places), settings.batch_size, settings.epochs, settings.seed, name)
    padded = [rectangles[place] for place in places]
    passes = training.passes_per_step(order, padded, settings.batch_size, budget, ranks) if order else 0
    steps = len(order) // settings.batch_size
    if not steps:
        raise UserError(f"{len(rows)} rows, less those held out, do not fill one step of {settings.batch_size}")
    tokens = sum(lengths[places[row]] for row in order)
    held_tokens = sum(lengths[place] for place in held["place"])
    return Work(
        rows=len(order),
        tokens=tokens,
        scored=held_tokens,
        length=tokens / max(1, texts * len(order)),
        longest=settings.max_length,
        steps=steps,
        passes=steps * passes,
        counted=counted,
    )
