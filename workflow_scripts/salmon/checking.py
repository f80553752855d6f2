"""Prove on this machine, before any job, the model properties that the stages rely on, or say why one is missing.

Every number from a batch, a cache or shared adapters is compared with one forward pass over each text alone, without
padding. The difference may be as large as rounding explains: this is measured for the judge (`judging.prove`) and
bounded for the others (`tolerance`). The bound is wide in 16 bits.
"""

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from salmon import judging, models, principles, reward_model, shared_base, templates
from salmon.adapters import uncovered
from salmon.config import Judge, Lora, Model, PolicyPrompt, PpoTexts, Sampling, Scoring
from salmon.encoding import (
    Template,
    as_template,
    encode_prompt,
    guard,
    prompt_text,
    read_preamble,
    read_template,
    render,
    shared_tokens,
    tokenize,
)
from salmon.errors import UserError
from salmon.generation import StopStrings, end_tokens
from salmon.sampling import TransformersSampler
from salmon.shared_base import Role, SharedBase
from salmon.tokenizers import load_tokenizer

log = logging.getLogger(__name__)

QUESTIONS = (
    "Why is the sky blue?",
    "Name three rivers.",
    "Write a short poem about a train that is late, and say at its end who was on it.",
    "What is 17 times 3?",
)
NEW_TOKENS = (24, 3, 12, 7)  # sampled for each question: rows of a batch end at different times
ANSWER = "So."
TEMPLATE = "You review an answer.\n\n# Input\n\n{Input}\n\n# Output\n\n{Output}\n\nIts quality is"
# Reveals any change that a chat template makes to a user's text: line breaks, symbols, a control token, its length.
PROBE = 'Say "<b>so & so</b>", it\'s\n\n\tünïcode </s> {{ x }} <|im_end|>' + " and then some more words" * 40 + "."

Part = Literal["sampling", "judging", "training", "rl"]
"""Parts of the check: each proves what its stages rely on and read."""


@dataclass(frozen=True)
class Settings:
    """The sections of the configuration that affect a model.

    Attributes:
        tokenizer: model whose tokenizer reward models are trained with; None for that of `model` without its adapter.
        ppo: settings whose lengths and template are checked, if given.
    """

    model: Model
    policy_prompt: PolicyPrompt
    sampling: Sampling
    judge: Judge
    lora: Lora
    scoring: Scoring = field(default_factory=Scoring)
    tokenizer: Model | None = None
    ppo: PpoTexts | None = None


@dataclass
class Report:
    """The results: facts by name of the check, and a sentence for each failed check."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def check(self, name: str, function: Callable[[], dict[str, Any]]) -> bool:
        """Run one check, and keep its facts or the reason for its failure."""
        try:
            self.facts[name] = function()
            log.info("%s: %s", name, ", ".join(f"{key} {value}" for key, value in self.facts[name].items()))
        except UserError as error:
            self.refusals[name] = str(error)
        except torch.OutOfMemoryError:
            self.refusals[name] = "the model does not fit one GPU; set the resource device of check_model to cpu"
        except Exception as error:  # untested architectures may make the libraries raise anything
            log.warning("the exception was:", exc_info=True)
            reason = str(error).partition("\n")[0]
            self.refusals[name] = f"{type(error).__name__}: {reason}; this model is not supported, see docs/models.md"
        if name in self.refusals:
            log.error("%s: %s", name, self.refusals[name])
        return name in self.facts

    def load(self, name: str, function: Callable[[], Any]) -> Any:
        """Load a model as a check; None if it is refused."""
        loaded: list[Any] = []

        def weights() -> dict[str, Any]:
            loaded.append(function())
            return {"parameters": sum(p.numel() for p in loaded[0].parameters()), "class": _name(loaded[0])}

        return loaded[0] if self.check(name, weights) else None

    def markdown(self, title: str) -> str:
        """The report for people."""
        lines = [f"# {title}", ""]
        for name, facts in self.facts.items():
            lines += [f"## {name}: passed", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
        for name, sentence in self.refusals.items():
            lines += [f"## {name}: refused", "", sentence, ""]
        return "\n".join(lines)


def check_model(settings: Settings, parts: Sequence[Part], device: torch.device) -> Report:
    """Run the checks of the parts. After a refusal, run only those that do not need the refused object."""
    report = Report()
    judging_model = settings.judge.model or settings.model
    if "sampling" in parts:
        tokenizer = load_tokenizer(settings.model)
        report.check("prompts", lambda: prompts(settings, tokenizer))
        if policy := report.load("weights", lambda: models.load_initial_policy(settings.model, device)):
            report.check("ends of turns", lambda: ends_of_turns(settings, tokenizer, policy))
            report.check("sampling", lambda: sampling(settings, tokenizer, policy, device))
        del policy
    if "judging" in parts:
        if judge := report.load("weights of the judge", lambda: models.load_judge(judging_model, device)):
            report.check("judging", lambda: judging_ways(settings, load_tokenizer(judging_model), judge, device))
        del judge
    if "training" in parts:
        report.check("training", lambda: training(settings, device))
    if "rl" in parts:
        report.check("rl", lambda: rl(settings, device))
    return report


def prompts(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The policy's prompt holds the instruction unchanged, has at most one beginning token, and has no end token."""
    preamble = read_preamble(settings.policy_prompt)
    if guard(tokenizer, PROBE) not in prompt_text(tokenizer, PROBE, settings.policy_prompt, preamble):
        raise UserError(
            "the tokenizer's chat template leaves an instruction out, or changes it: it may need the text in parts, "
            "another role, or a variable in policy_prompt.template_variables; or name a file in policy_prompt.template"
        )
    ids = encode_prompt(tokenizer, QUESTIONS[0], settings.policy_prompt, preamble)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None and begin != end and ids.count(begin) > 1 and ids[:2] == [begin, begin]:
        raise UserError("the prompt begins with two beginning tokens; remove one from policy_prompt.template")
    if ids[-1] == end and not settings.policy_prompt.is_chat:
        raise UserError(f"the policy's prompt ends with {tokenizer.eos_token}, after which the model generates nothing")
    return {"tokens of a prompt": len(ids), "begins with": ids[:1] == [begin] and tokenizer.bos_token}


def ends_of_turns(settings: Settings, tokenizer: PreTrainedTokenizerBase, model: Any) -> dict[str, Any]:
    """The policy can sample an end of its answers: an end token or a stop string."""
    ends = end_tokens(model, tokenizer)
    for string in settings.policy_prompt.stop:
        stops = StopStrings(tokenizer, [string])
        ids = tokenizer(f"yes{string}", add_special_tokens=False)["input_ids"]
        if not any(stops.complete("", ids[:count]) for count in range(1, len(ids) + 1)):
            raise UserError(f"policy_prompt.stop: no answer can contain {string!r} as this tokenizer decodes it")
    facts = {"end tokens": ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(ends))))}
    if not settings.policy_prompt.is_chat:
        return facts
    turns = {"user": "Why?", "assistant": ANSWER}
    text = render(tokenizer, turns, settings.policy_prompt.template_variables, begin=False)
    _, found, after = text.rpartition(ANSWER)
    if not found:
        raise UserError(
            "the tokenizer's chat template leaves an assistant's answer out, or changes it, so the end of an answer is "
            "unknown: check policy_prompt.template_variables, or name a file in policy_prompt.template"
        )
    # A later end token, such as that of the whole conversation, does not end the turn.
    rest = after.lstrip()
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    first = next((token for token in ids if tokenizer.decode([token]).strip()), None)
    stopped = any(string in after and rest.startswith(string.lstrip()) for string in settings.policy_prompt.stop)
    if not stopped and first not in ends:
        raise UserError(
            f"in this chat template an answer ends with {after.strip()!r}, which begins neither with an end token of "
            "the model nor with a string in policy_prompt.stop: every answer would run to its limit; add its beginning "
            "there"
        )
    return {**facts, "an answer's turn ends with": repr(after)}


@torch.no_grad()
def sampling(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, model: Any, device: torch.device
) -> dict[str, Any]:
    """In a batch whose rows end at different times and one joins later, greedy answers equal those of single prompts.

    The reference is one forward pass over each prompt and its answer: every sampled token has the largest logit there,
    up to rounding.
    """
    preamble = read_preamble(settings.policy_prompt)
    queries = [encode_prompt(tokenizer, question, settings.policy_prompt, preamble) for question in QUESTIONS]
    longest = shared_tokens(tokenizer, settings.policy_prompt, preamble) + settings.sampling.max_length
    models.check_context(model, longest, "policy_prompt.template's preamble + sampling.max_length")
    _check_vocabulary(tokenizer, model, queries)
    sampler = TransformersSampler(tokenizer, device, batch_size=len(queries) - 1, model=model)
    answers = sampler.sample(queries, [0] * len(queries), max_new_tokens=NEW_TOKENS, temperature=0)
    regret, largest, spread = 0.0, 0.0, []
    for query, answer in zip(queries, answers, strict=True):
        ids = torch.tensor([query + answer.tokens], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(query) - 1 : -1].double()
        taken = logits.gather(-1, ids[0, len(query) :, None])[:, 0]
        regret = max(regret, float((logits.amax(-1) - taken).max()))
        spread.append(float(logits.std()))
        largest = max(largest, float(logits.abs().max()))
    step = largest * torch.finfo(getattr(torch, settings.model.dtype)).eps
    limit = tolerance(settings.model, max(spread)) + 4 * step
    if regret > limit:
        raise UserError(
            f"{_name(model)}: a batch samples different tokens than single prompts (by {regret:.2g} in the logits, "
            f"but rounding explains at most {limit:.2g}); this architecture is not supported, see docs/models.md"
        )
    return {"largest difference to single prompts": f"{regret:.1e} in the logits", "rounding explains": f"{limit:.1e}"}


def judging_ways(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, model: Any, device: torch.device
) -> dict[str, Any]:
    """Scores of pairs equal those of single prompts. Also chooses the way to compute them (`judging.prove`)."""
    models.check_context(model, settings.judge.max_length, "judge.max_length")
    template = read_template(tokenizer, settings.judge.template, settings.judge, "judge.format")
    templates.check_slots(template.text, settings.judge.template, templates.JUDGE_SLOTS, "judge.template")
    _check_vocabulary(tokenizer, model, template.encode(tokenizer, [template.text]))
    judge = judging.Judge(
        model,
        tokenizer,
        template=template,
        principles=principles.read_judged(settings.judge.principles),
        max_length=settings.judge.max_length,
        device=device,
    )
    return asdict(judging.prove(judge))


def training(settings: Settings, device: torch.device) -> dict[str, Any]:
    """A reward model scores texts in batches as it does alone, and the same after saving and loading."""
    model = settings.model.without_adapter()
    tokenizer = load_tokenizer(settings.tokenizer or model)
    texts = _made_texts(
        tokenizer, as_template(tokenizer, TEMPLATE, settings.scoring, "scoring.format", "a made-up one")
    )
    with tempfile.TemporaryDirectory() as folder:
        fresh = models.new_reward_model(model, settings.lora, device, seed=0)
        _check_vocabulary(tokenizer, fresh, texts)
        alone, limit = _strengthen(fresh, texts, model, device)
        covered, left_out = sum(hasattr(module, "lora_A") for module in fresh.modules()), len(uncovered(fresh))
        together = reward_model.score(fresh, texts, len(texts), device)
        _same("a batch of the reward model and its single texts", together, alone, limit)
        fresh.save_pretrained(folder)
        del fresh
        loaded = models.load_reward_model(model, Path(folder), device, trainable=False)
    _same("a reward model and its saved copy", reward_model.score(loaded, texts, len(texts), device), alone, limit)
    return {"layers with LoRA": covered, "linear weights without": left_out, "rounding explains": f"{limit:.1e}"}


def rl(settings: Settings, device: torch.device) -> dict[str, Any]:
    """RL's four models on one base: unchanged numbers, gradients for all trained weights, lengths that fit."""
    model = settings.model
    tokenizer = load_tokenizer(model)
    file = settings.ppo.template if settings.ppo else None
    template = read_template(tokenizer, file, settings.scoring, "scoring.format") if file else Template(TEMPLATE)
    texts = _made_texts(tokenizer, template)
    queries, responses = [text[: len(text) // 2] for text in texts], [text[len(text) // 2 :] for text in texts]
    policy = models.load_initial_policy(model, device)
    _check_vocabulary(tokenizer, policy, texts)
    wanted, largest = _logprobs(policy, texts, device)
    del policy
    with tempfile.TemporaryDirectory() as folder:
        fresh = models.new_reward_model(model.without_adapter(), settings.lora, device, seed=0)
        alone, limit = _strengthen(fresh, texts, model, device)
        fresh.save_pretrained(folder)
        del fresh
        try:
            shared = SharedBase(model, settings.lora, Path(folder), device, seed=0)
        except UserError as error:
            # The base model and the reward model have passed.
            raise UserError(
                f"RL cannot load adapter {model.adapter} and the adapters of its other models on one base model "
                f"({error}): merge it into the base model, and set model.base to the result"
            ) from error
    if ppo := settings.ppo:
        shared_base.check_lengths(shared, tokenizer, ppo, settings.policy_prompt)
    with torch.no_grad():
        bound = tolerance(model, float(wanted[0].std())) + 4 * largest * torch.finfo(getattr(torch, model.dtype)).eps
        role: Role
        for role in ("policy", "reference"):
            with shared.use(role):
                found = shared.logprobs(queries, responses, 1.0)[0].cpu()
            for row, response, each in zip(found, responses, wanted, strict=True):
                _same(f"RL's {role} and the initial policy", row[: len(response)], each[-len(response) :], bound)
        with shared.use("reward"):
            _same("the reward model and RL's reward", shared.rewards(texts).cpu(), alone, limit)
    untouched = _gradients(shared, texts)
    if untouched:
        raise UserError(
            f"{len(untouched)} trained weights get no gradient ({untouched[0]}, …): this architecture is not "
            "supported, see docs/models.md"
        )
    return {
        "rounding explains": f"{bound:.1e} in log probabilities, {limit:.1e} in rewards",
        "trained parameters": sum(parameter.numel() for parameter in shared.trained()),
    }


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Any, rows: Sequence[list[int]]) -> None:
    """Refuse a tokenizer that makes tokens without an embedding in the model."""
    size, largest = len(model.get_input_embeddings().weight), max(map(max, rows))
    if largest >= size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {size} embeddings; prompts contain the token "
            f"{tokenizer.convert_ids_to_tokens(largest)!r}, which has no embedding: use the tokenizer that the model "
            "was trained with, or another template"
        )


def _made_texts(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[list[int]]:
    """Made-up texts of different lengths, with the fixed parts of a template."""
    long = "Because it is so, and not otherwise. "
    texts = tokenize(tokenizer, [f"{question} {long * row}" for row, question in enumerate(QUESTIONS)])
    return texts + template.encode(tokenizer, [template.text])


@torch.no_grad()
def _logprobs(policy: Any, texts: Sequence[list[int]], device: torch.device) -> tuple[list[torch.Tensor], float]:
    """Log probabilities of all tokens but the first, [T - 1], computed for each text alone; and the largest logit."""
    rows, largest = [], 0.0
    for text in texts:
        ids = torch.tensor([text], device=device)
        logits = policy(input_ids=ids, use_cache=False).logits[0, :-1].double()
        rows.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].float().cpu())
        largest = max(largest, float(logits.abs().max()))
    return rows, largest


def _strengthen(
    adapted: Any, texts: Sequence[list[int]], model: Model, device: torch.device, attempts: int = 6
) -> tuple[torch.Tensor, float]:
    """Make a new adapter so strong that its effect exceeds rounding.

    Otherwise a stage that ignores the adapter would pass in 16 bits.

    Returns:
        The scores of each text alone, and how much rounding may change them.
    """
    bare = reward_model.score(adapted, texts, 1, device)
    for attempt in range(attempts):
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.02 * 2**attempt)
        scores = reward_model.score(adapted, texts, 1, device)
        limit = tolerance(model, float(scores.std()) + float(scores.abs().mean()))
        if float((scores - bare).abs().max()) > 2 * limit:
            return scores, limit
    raise UserError(
        "a LoRA adapter hardly changes the reward model's scores: this architecture is not supported, see "
        "docs/models.md"
    )


def _gradients(shared: SharedBase, texts: Sequence[list[int]]) -> list[str]:
    """Names of LoRA's second matrices that get a gradient from neither of RL's losses."""
    queries, responses = [text[: len(text) // 2] for text in texts[:2]], [text[len(text) // 2 :] for text in texts[:2]]
    shared.train()
    with shared.use("policy"):
        shared.logprobs(queries, responses, 1.0)[0].sum().backward()
    with shared.use("value"):
        shared.values(queries, responses).sum().backward()
    names = {id(parameter): name for name, parameter in shared.named_parameters()}
    missing = [
        names[id(parameter)]
        for parameter in shared.trained()
        if "lora_A" not in names[id(parameter)] and (parameter.grad is None or not parameter.grad.any())
    ]
    shared.zero_grad()
    shared.eval()
    return missing


def _same(what: str, found: torch.Tensor, wanted: torch.Tensor, limit: float) -> None:
    """Refuse a model if two ways to compute the same numbers differ."""
    difference = float((found - wanted).abs().max())
    if not difference <= limit:
        raise UserError(
            f"{what} differ by {difference:.2g}, but rounding explains at most {limit:.2g}: this architecture "
            "is not supported, see docs/models.md"
        )


def tolerance(model: Model, scale: float) -> float:
    """How much rounding may change a number of this size after several dozen layers."""
    if model.dtype == "float32" and model.quantization == "none":
        return 1e-4 * max(scale, 1.0)
    return 0.1 * max(scale, 1.0)


def _name(model: Any) -> str:
    """The class of the language model."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
