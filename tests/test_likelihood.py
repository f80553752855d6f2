"""Log probabilities of answers, in one piece and in several, against one token at a time in float64."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from salmon import likelihood, models
from salmon.config import Model
from tests import zoo

PROMPTS = [[1, 50, 61, 72, 83, 94], [1, 9], [1, 300, 301, 302]]
ANSWERS = [[7, 8, 2], [10, 11, 12, 13, 14, 2], [33]]
TEMPERATURE = 0.7


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return models.load_base(Model(base=str(tiny_model), quantization="none", dtype="float32"), "cpu")


def slow(model: Any, prompt: list[int], answer: list[int]) -> tuple[list[float], list[float]]:
    """Log probabilities and entropies, one forward pass per token."""
    found, entropies = [], []
    for t, token in enumerate(answer):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer[:t]])).logits[0, -1].double()
        distribution = torch.log_softmax(logits / TEMPERATURE, 0)
        found.append(float(distribution[token]))
        entropies.append(float(-(distribution.exp() * distribution).sum()))
    return found, entropies


@pytest.fixture(params=["whole", "pieces", "other ranks have more"])
def most(request: pytest.FixtureRequest, model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The output layer is called once, for 3 tokens at a time, or for fewer because another rank has 40."""
    vocabulary = model.config.vocab_size
    calls: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape[1]))
    if request.param != "whole":
        monkeypatch.setattr(likelihood, "LOGITS", 3 * vocabulary)
    likelihood.has_apart(model, torch.tensor([[1, 5]]))
    calls.clear()
    yield 40 if request.param == "other ranks have more" else 0
    hook.remove()
    wanted = {"whole": [10], "pieces": [3, 3, 2, 2], "other ranks have more": [1] * 10 + [0] * 4}[request.param]
    assert calls[: len(wanted)] == wanted


def test_numbers_are_those_of_one_token_at_a_time(model: Any, most: int) -> None:
    with torch.no_grad():
        logprobs, entropies = likelihood.answer_logprobs(
            model, PROMPTS, ANSWERS, TEMPERATURE, most=most, with_entropy=True
        )
    assert entropies is not None
    assert logprobs.shape == entropies.shape == (3, 6)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        wanted, disorder = slow(model, prompt, answer)
        assert logprobs[row, : len(answer)].tolist() == pytest.approx(wanted, abs=2e-5)
        assert entropies[row, : len(answer)].tolist() == pytest.approx(disorder, abs=2e-5)
        assert not logprobs[row, len(answer) :].any()
        assert not entropies[row, len(answer) :].any()


def test_the_gradient_is_that_of_cross_entropy(model: Any, most: int) -> None:
    """In float64, each row alone with all of its logits; each token has a different weight."""
    weights = torch.arange(1.0, 7.0)
    logprobs, _ = likelihood.answer_logprobs(model, PROMPTS, ANSWERS, TEMPERATURE, most=most)
    (logprobs * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    other = in_float64(model)
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logits = other(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        losses = nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
        (-losses * weights[: len(answer)]).sum().backward()
    for name, parameter in other.named_parameters():
        difference = (found[name].double() - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-5, name


def in_float64(model: Any) -> Any:
    """The same weights in float64, in a separate model."""
    other = type(model)(model.config).double().eval()
    other.load_state_dict(model.state_dict())
    return other


def test_factors_and_caps_of_the_architecture_are_kept(tmp_path: Path) -> None:
    """Gemma 2 caps its logits, Cohere and Granite scale them: the output layer alone gives something else."""
    for kind in ("gemma2", "cohere2", "granite"):
        zoo.build(kind, tmp_path / kind)
        settings = Model(base=str(tmp_path / kind), quantization="none", dtype="float32", attention="eager")
        model = models.load_base(settings, "cpu")
        tokens = torch.tensor([[3, 4, 5]])
        with torch.no_grad():
            states = model.base_model(input_ids=tokens).last_hidden_state[0]
            whole = model(input_ids=tokens).logits[0]
            assert (model.get_output_embeddings()(states) - whole).abs().max() > 1e-4, kind
            torch.testing.assert_close(likelihood.logits_of(model, states), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("trouble", ["another result", "no such layers"])
def test_where_the_output_layer_cannot_be_called_for_itself_all_logits_are_kept(
    model: Any, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    if trouble == "another result":
        monkeypatch.setattr(likelihood, "logits_of", lambda causal, states: causal.lm_head(states) + 0.1)
    else:
        monkeypatch.setattr(model, "base_model_prefix", "layers_of_another_name")
    with torch.no_grad():
        logprobs, _ = likelihood.answer_logprobs(model, PROMPTS, ANSWERS, TEMPERATURE)
    assert not likelihood.has_apart(model, torch.tensor([[1, 5]]))
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        assert logprobs[row, : len(answer)].tolist() == pytest.approx(slow(model, prompt, answer)[0], abs=2e-5)


def test_sums_of_answers_some_of_them_empty(model: Any) -> None:
    answers = [*ANSWERS, []]
    found = likelihood.sequence_logprobs(model, [*PROMPTS, [1]], answers, TEMPERATURE, 2)
    expected = [sum(slow(model, prompt, answer)[0]) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert found.tolist() == pytest.approx([*expected, 0.0], abs=1e-4)
