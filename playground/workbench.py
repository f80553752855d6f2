"""Policies, reward models and the judge of a folder of results, as LoRA adapters on one base model.

Only one adapter is active at a time (`use`), so only one computation runs at a time, under `lock`.
"""

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from peft import PeftModel, TaskType
from torch import nn
from transformers import PreTrainedTokenizerBase

from playground.results import Policy, Results, Scorer
from salmon import encoding, models, reward_model, templates
from salmon.adapters import add_lora, load_adapter
from salmon.config import Lora
from salmon.errors import UserError
from salmon.identity import context_limit
from salmon.judging import Judge, Pair
from salmon.principles import JudgedPrinciple
from salmon.sampling import TransformersSampler, without_thinking
from salmon.text import cut_at_markers
from salmon.tokenizers import load_tokenizer

log = logging.getLogger(__name__)

Adapter = tuple[str, str | None]
"""Folder or hub id, and revision."""
BATCH = 8  # texts per forward pass


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge says of two answers under a principle.

    Attributes:
        s12: log odds of the first answer, in nats, where it is shown as (a); likewise `s21`, where it is shown as (b).
        prompts: the judge's prompts, with the first answer as (a), and as (b).
    """

    dimension: str
    s12: float
    s21: float
    prompts: tuple[str, str]


class Workbench:
    """Answers, scores and verdicts.

    Args:
        results: what there is.
        device: where everything is computed.
    """

    def __init__(self, results: Results, device: torch.device) -> None:
        self.results, self.device = results, device
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.policies = {one.name: one for one in results.policies}
        self.scorers = {one.name: one for one in results.scorers}
        model = results.policies[0].model
        # The judge says which tokens see which, and flash attention cannot take that.
        attention = "eager" if model.attention == "eager" else "sdpa"
        base = models.load_base(model.model_copy(update={"attention": attention}), device)
        base.requires_grad_(False)
        self.limit = context_limit(base.config.to_dict())
        # An adapter that changes nothing, so that PEFT knows the model as a language model.
        self.lm: PeftModel = add_lora(base, Lora(r=1), TaskType.CAUSAL_LM)
        self.adapters: dict[Adapter, str] = {}
        judged = results.judge.model if results.judge else None
        for adapter in (
            *(policy.adapter for policy in results.policies),
            *((str(scorer.folder), None) for scorer in results.scorers),
            (judged.adapter, judged.adapter_revision) if judged and judged.adapter else None,
        ):
            if adapter and adapter not in self.adapters:
                name = f"adapter{len(self.adapters)}"
                load_adapter(self.lm, adapter[0], name, revision=adapter[1], head_elsewhere=True)
                self.adapters[adapter] = name
        self.heads = {one.name: models.read_head(one.folder).to(device) for one in results.scorers}
        self.lm.requires_grad_(False).eval()
        self.tokenizers = {one.name: load_tokenizer(one.model) for one in results.policies}
        self.scorer_tokenizers = {one.name: load_tokenizer(one.tokenizer) for one in results.scorers}
        self.judge_tokenizer = load_tokenizer(judged) if judged else None
        log.info("%d adapters on %s", len(self.adapters), model.base)

    def close(self) -> None:
        """End whatever is being computed; nothing is computed after it."""
        self.closing.set()
        self.lock.acquire(timeout=60)

    @contextmanager
    def use(self, adapter: Adapter | None) -> Iterator[nn.Module]:
        """The causal language model with this adapter active, or the bare base model; nobody else has it meanwhile."""
        with self.lock:
            if self.closing.is_set():
                raise InterruptedError
            self.lm.eval()
            model: nn.Module = self.lm.get_base_model()
            if adapter is None:
                with self.lm.disable_adapter():
                    yield model
            else:
                self.lm.set_adapter(self.adapters[adapter])
                self.lm.requires_grad_(False)
                yield model

    def prompt(self, policy: Policy, instruction: str) -> list[int]:
        """Tokens of what a policy continues.

        Raises:
            UserError: if the instruction is empty, or the prompt is longer than those of RL.
        """
        if not instruction.strip():
            raise UserError("There is nothing to answer yet: write an instruction.")
        tokenizer = self.tokenizers[policy.name]
        tokens = encoding.encode_prompt(tokenizer, instruction, policy.prompt, encoding.read_preamble(policy.prompt))
        if len(tokens) > policy.ppo.query_length:
            raise UserError(
                f"The prompt has {len(tokens)} tokens, and {policy.name} reads at most {policy.ppo.query_length} "
                "(ppo.query_length): shorten the instruction."
            )
        return tokens

    def answers(
        self, policy: Policy, instruction: str, *, temperature: float, seed: int, max_tokens: int
    ) -> Iterator[str]:
        """The answer of a policy as it grows; the last text is the whole answer, without thinking."""
        prompt = self.prompt(policy, instruction)
        room = max_tokens if self.limit is None else min(max_tokens, self.limit - len(prompt))
        if room < 1:
            raise UserError(f"The model has {self.limit} positions, and the prompt takes all of them: shorten it.")
        tokenizer = self.tokenizers[policy.name]
        pieces: queue.SimpleQueue[list[int] | str | BaseException] = queue.SimpleQueue()
        sampled: list[int] = []
        given_up = threading.Event()

        def watch(_: Sequence[int], tokens: Sequence[int]) -> None:
            sampled.extend(tokens)
            pieces.put([*sampled])
            if given_up.is_set() or self.closing.is_set():
                raise InterruptedError

        def work() -> None:
            try:
                with self.use(policy.adapter) as model:
                    sampler = TransformersSampler(tokenizer, self.device, batch_size=1, model=model, watch=watch)
                    [answer] = sampler.sample(
                        [prompt], [seed], max_new_tokens=[room], temperature=temperature, stop=policy.prompt.stop
                    )
                begun = encoding.begins_thinking(tokenizer, policy.prompt, encoding.read_preamble(policy.prompt))
                pieces.put(without_thinking(tokenizer, answer, policy.prompt.thinking, begun=begun)[0])
            except BaseException as error:
                pieces.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while not isinstance(piece := pieces.get(), str):
                if isinstance(piece, BaseException):
                    raise piece
                if pieces.empty():  # tokens may come faster than the page draws
                    yield decode(tokenizer, piece, skip_special_tokens=True)
            yield piece
        finally:
            given_up.set()
            worker.join()

    def reads_principles(self, scorer: Scorer) -> bool:
        """Whether a reward model's template has a place for principles; that of PMP has none."""
        return "{Dimensions}" in templates.read(scorer.template)

    def reward_texts(
        self, scorer: Scorer, instruction: str, answers: Sequence[str], shown: Sequence[Sequence[str]]
    ) -> tuple[list[list[int]], set[int]]:
        """Tokens of what a reward model reads: for each list of sentences, every answer under it.

        Returns:
            The texts; and the places of the answers that were too long to be read to their ends.
        """
        tokenizer = self.scorer_tokenizers[scorer.name]
        template = encoding.read_template(tokenizer, scorer.template, scorer.scoring, "scoring.format")
        pairs = [(answer, sentences) for sentences in shown for answer in answers]
        cut: dict[str, set[int]] = {}
        texts = reward_model.reward_text_tokens(
            tokenizer,
            template,
            [instruction] * len(pairs),
            [answer for answer, _ in pairs],
            [list(sentences) for _, sentences in pairs],
            query_length=scorer.query_length,
            response_length=scorer.response_length,
            max_length=scorer.max_length,
            keys="reward_model.",
            cut=cut,
        )
        return texts, {place % len(answers) for place in cut.get("outputs", ())}

    def rewards(
        self, scorer: Scorer, instruction: str, answers: Sequence[str], shown: Sequence[Sequence[str]]
    ) -> tuple[list[list[float]], set[int]]:
        """Rewards of answers, a list of them for each list of sentences shown; and which answers were cut."""
        texts, cut = self.reward_texts(scorer, instruction, answers, shown)
        with self.use((str(scorer.folder), None)) as model:
            scored = reward_model.score(_WithHead(model, self.heads[scorer.name]), texts, BATCH, self.device)
        rows: list[list[float]] = scored.view(len(shown), len(answers)).tolist()
        return rows, cut

    def judge(
        self, instruction: str, one: str, other: str, principles: Sequence[JudgedPrinciple]
    ) -> tuple[list[Verdict], bool]:
        """Verdicts about two answers, by principle; and whether the answers were too long to be read to their ends.

        Raises:
            UserError: if the results have no judge, or the pair does not fit.
        """
        settings, tokenizer = self.results.judge, self.judge_tokenizer
        if settings is None or tokenizer is None:
            raise UserError("These results have no judge on this base model.")
        template = encoding.read_template(tokenizer, settings.template, settings.form, "judge.format")
        pair = Pair("here", instruction, *(cut_at_markers(text, settings.turn_markers) for text in (one, other)))
        model = settings.model
        with self.use((model.adapter, model.adapter_revision) if model.adapter else None) as judging:
            judge = Judge(
                judging,
                tokenizer,
                template=template,
                principles=principles,
                max_length=settings.max_length,
                device=self.device,
                way="whole",
            )
            [scores] = judge.judge([pair])
        prompts = judge.encode(pair)
        if scores is None or prompts is None:
            raise UserError(f"The judge reads at most {settings.max_length} tokens: the instruction leaves no room.")
        verdicts = [
            Verdict(principle.dimension, *score, prompts=(decode(tokenizer, first), decode(tokenizer, second)))
            for principle, score, first, second in zip(
                principles, scores, prompts.order_12, prompts.order_21, strict=True
            )
        ]
        return verdicts, bool(judge.cut)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """Text of tokens, with spaces as they are."""
    text: str = tokenizer.decode(
        list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return text


class _WithHead(nn.Module):
    """A causal language model as a reward model, whose adapter is active while it is used."""

    def __init__(self, model: nn.Module, head: torch.Tensor) -> None:
        super().__init__()
        self.model, self.head = model, head
        self.eval()  # `score` restores the mode that it finds

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """`logits`: rewards, float32 [B, 1]; texts are padded on their right."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # type: ignore[operator]
        last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]
        return SimpleNamespace(logits=last.float() @ self.head.T)
