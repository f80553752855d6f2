"""Policies, reward models and the judge of a folder of results, as LoRA adapters on one base model.

Only one adapter is active at a time (`use`), so that one thing is computed at a time: callers hold `lock`.
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

from playground.results import JudgeSettings, Policy, Results, Scorer
from salmon import encoding, models, reward_model, templates
from salmon.adapters import add_lora, load_adapter
from salmon.config import Lora
from salmon.errors import UserError
from salmon.judging import Judge, Pair
from salmon.principles import JudgedPrinciple
from salmon.sampling import TransformersSampler, without_thinking
from salmon.tokenizers import load_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge says of two answers under a principle.

    Attributes:
        s12: log odds of the first answer, in nats, where it is shown as (a); likewise `s21`, where it is shown as (b).
    """

    dimension: str
    s12: float
    s21: float


class Workbench:
    """Answers, scores and verdicts.

    Args:
        results: what there is.
        device: where everything is computed.
    """

    def __init__(self, results: Results, device: torch.device) -> None:
        self.results, self.device = results, device
        self.lock = threading.Lock()
        self.policies = {one.name: one for one in results.policies}
        self.scorers = {one.name: one for one in results.scorers}
        base = models.load_base(results.policies[0].model, device)
        base.requires_grad_(False)
        # An adapter that changes nothing, so that PEFT knows the model as a language model.
        self.lm: PeftModel = add_lora(base, Lora(r=1), TaskType.CAUSAL_LM).eval()
        self.adapters: dict[str, str] = {}  # folder or hub id -> name on the model
        for policy in results.policies:
            self._add(str(policy.folder) if policy.folder else policy.model.adapter)
        if results.judge:
            self._add(results.judge.model.adapter)
        self.heads: dict[str, torch.Tensor] = {}
        for scorer in results.scorers:
            self.heads[scorer.name] = models.read_head(scorer.folder).to(device)
            self._add(str(scorer.folder))
        self.lm.requires_grad_(False).eval()
        self.tokenizers = {one.name: load_tokenizer(one.model) for one in results.policies}
        self.tokenizer = self.tokenizers[results.policies[0].name]  # of the reward models, as in evaluation
        log.info("%d adapters on %s", len(self.adapters), results.policies[0].model.base)

    def _add(self, adapter: str | None) -> None:
        if adapter and adapter not in self.adapters:
            name = f"adapter{len(self.adapters)}"
            load_adapter(self.lm, adapter, name, head_elsewhere=True)
            self.adapters[adapter] = name

    @contextmanager
    def use(self, adapter: str | None) -> Iterator[nn.Module]:
        """The causal language model with this adapter active, or the bare base model."""
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
            UserError: where there is no instruction, or the prompt is longer than RL's.
        """
        if not instruction.strip():
            raise UserError("There is nothing to answer yet: write an instruction.")
        tokenizer = self.tokenizers[policy.name]
        tokens = encoding.encode_prompt(tokenizer, instruction, policy.prompt, encoding.read_preamble(policy.prompt))
        if len(tokens) > policy.ppo.query_length:
            raise UserError(
                f"The prompt has {len(tokens)} tokens, and {policy.name} reads {policy.ppo.query_length} at most "
                "(ppo.query_length): shorten the instruction."
            )
        return tokens

    def answers(
        self, policy: Policy, instruction: str, *, temperature: float, seed: int, max_tokens: int
    ) -> Iterator[str]:
        """The answer of a policy as it grows, sampled as in RL; the last text is the whole answer."""
        prompt = self.prompt(policy, instruction)
        tokenizer = self.tokenizers[policy.name]
        pieces: queue.SimpleQueue[list[int] | str | BaseException] = queue.SimpleQueue()
        sampled: list[int] = []
        given_up = threading.Event()

        def watch(_: Sequence[int], tokens: Sequence[int]) -> None:
            sampled.extend(tokens)
            pieces.put([*sampled])
            if given_up.is_set():
                raise InterruptedError

        def work() -> None:
            try:
                with self.lock, self.use(str(policy.folder) if policy.folder else policy.model.adapter) as model:
                    sampler = TransformersSampler(tokenizer, self.device, batch_size=1, model=model, watch=watch)
                    [answer] = sampler.sample(
                        [prompt], [seed], max_new_tokens=[max_tokens], temperature=temperature, stop=policy.prompt.stop
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
                if pieces.empty():  # the page need not show every token where they come faster than it draws
                    yield tokenizer.decode(piece, skip_special_tokens=True)
            yield piece
        finally:
            given_up.set()
            worker.join()

    def reads_principles(self, scorer: Scorer) -> bool:
        """Whether a reward model's template has a place for principles; that of pre-training has none."""
        return "{Dimensions}" in templates.read(scorer.settings.template)

    def reward_texts(
        self, scorer: Scorer, instruction: str, answers: Sequence[str], shown: Sequence[Sequence[str]]
    ) -> list[list[int]]:
        """Tokens of what a reward model reads: for each list of sentences, every answer under it."""
        settings = scorer.settings
        template = encoding.read_template(self.tokenizer, settings.template, scorer.scoring, "scoring.format")
        pairs = [(answer, sentences) for sentences in shown for answer in answers]
        return reward_model.reward_text_tokens(
            self.tokenizer,
            template,
            [instruction] * len(pairs),
            [answer for answer, _ in pairs],
            [list(sentences) for _, sentences in pairs],
            query_length=settings.query_length,
            response_length=settings.response_length,
            max_length=settings.max_length,
            keys="reward_model.",
        )

    def rewards(
        self, scorer: Scorer, instruction: str, answers: Sequence[str], shown: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Rewards of answers, a list of them for each list of sentences shown."""
        texts = self.reward_texts(scorer, instruction, answers, shown)
        with self.lock, self.use(str(scorer.folder)) as model:
            scored = reward_model.score(_WithHead(model, self.heads[scorer.name]), texts, 8, self.device)
        rows: list[list[float]] = scored.view(len(shown), len(answers)).tolist()
        return rows

    def judge(
        self, instruction: str, one: str, other: str, principles: Sequence[JudgedPrinciple]
    ) -> tuple[list[Verdict], list[tuple[str, str]]]:
        """Verdicts about two answers; and the prompts of each principle, with the first answer as (a) and as (b).

        Raises:
            UserError: where there is no judge, or the pair does not fit.
        """
        settings: JudgeSettings | None = self.results.judge
        if settings is None:
            raise UserError("These results hold no judgements, so the settings of the judge are unknown.")
        tokenizer = load_tokenizer(settings.model)
        template = encoding.read_template(tokenizer, settings.template, settings.form, "judge.format")
        pair = Pair("playground", instruction, one, other)
        with self.lock, self.use(settings.model.adapter) as model:
            judge = Judge(
                model,
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
            raise UserError(f"The judge reads {settings.max_length} tokens at most: the instruction leaves no room.")
        decoded = [
            (tokenizer.decode(first), tokenizer.decode(second))
            for first, second in zip(prompts.order_12, prompts.order_21, strict=True)
        ]
        return [Verdict(p.dimension, *score) for p, score in zip(principles, scores, strict=True)], decoded


class _WithHead(nn.Module):
    """A causal language model as a reward model, whose adapter is active while it is used."""

    def __init__(self, model: nn.Module, head: torch.Tensor) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """`logits`: rewards, float32 [B, 1]; texts are padded on their right."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # type: ignore[operator]
        last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]
        return SimpleNamespace(logits=last.float() @ self.head.T)
