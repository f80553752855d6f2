"""Four models on one base: each equals the same model alone, and each loss trains exactly what it should."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from salmon import adapters, models, reward_model
from salmon.config import Lora, Model
from salmon.errors import UserError
from salmon.shared_base import Role, SharedBase

QUERIES = [[1, 50, 61, 72, 83, 94], [1, 9], [1, 300, 301, 302]]
RESPONSES = [[7, 8, 2], [10, 11, 12, 13, 14, 2], [33]]
LORA = Lora(r=4)
TEMPERATURE = 0.7
Kind = Literal["adapter", "fresh"]


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Model:
    return Model(base=str(tiny_model), quantization="none", dtype="float32")


@pytest.fixture(scope="module")
def reward_folder(plain: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as train_reward_model.py leaves it, none of its weights zero."""
    folder = tmp_path_factory.mktemp("reward-model")
    model = models.new_reward_model(plain, LORA, "cpu", seed=3)
    return save_randomised(model, folder)


@pytest.fixture(scope="module")
def adapter_folder(plain: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of an initial policy, as fine-tuning leaves it."""
    from peft import TaskType

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(5)
    model = adapters.add_lora(models.load_base(plain, "cpu"), LORA, TaskType.CAUSAL_LM)
    return save_randomised(model, folder)


def save_randomised(model: PeftModel, folder: Path) -> Path:
    """Save a PEFT model whose LoRA B weights, zero at first, are random, so that the adapter changes the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(str(folder))
    return folder


def settings(plain: Model, adapter_folder: Path, kind: Kind, **changes: Any) -> Model:
    return plain.model_copy(update={"adapter": str(adapter_folder) if kind == "adapter" else None, **changes})


@pytest.fixture(params=["adapter", "fresh"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def shared(plain: Model, adapter_folder: Path, reward_folder: Path, kind: Kind) -> SharedBase:
    return SharedBase(settings(plain, adapter_folder, kind), LORA, reward_folder, torch.device("cpu"), seed=1)


def disturb(shared: SharedBase) -> None:
    """The state after some training: the trained weights have changed."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in shared.trained():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def logprobs_of(
    shared: SharedBase, role: Role, queries: Sequence[list[int]] = QUERIES, responses: Sequence[list[int]] = RESPONSES
) -> list[torch.Tensor]:
    with torch.no_grad(), shared.use(role):
        found, _ = shared.logprobs(queries, responses, TEMPERATURE)
    return [row[: len(response)] for row, response in zip(found, responses, strict=True)]


def values_of(
    shared: SharedBase, queries: Sequence[list[int]] = QUERIES, responses: Sequence[list[int]] = RESPONSES
) -> list[torch.Tensor]:
    with torch.no_grad(), shared.use("value"):
        found = shared.values(queries, responses)
    return [row[: len(response)] for row, response in zip(found, responses, strict=True)]


def rewards_of(shared: SharedBase, texts: Sequence[list[int]]) -> torch.Tensor:
    with torch.no_grad(), shared.use("reward"):
        return shared.rewards(texts)


def slow_logprobs(model: nn.Module, query: list[int], response: list[int]) -> list[float]:
    """One row, no padding; one forward pass per token; the softmax in float64."""
    found = []
    for t, token in enumerate(response):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([query + response[:t]])).logits[0, -1].double()
        found.append(float(torch.log_softmax(logits / TEMPERATURE, 0)[token]))
    return found


def gradients(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]).double()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# -- what the four are at the start


def test_policy_starts_as_the_initial_policy(
    shared: SharedBase, plain: Model, adapter_folder: Path, kind: Kind
) -> None:
    alone = models.load_initial_policy(settings(plain, adapter_folder, kind), "cpu")
    for role in ("policy", "reference"):
        for found, query, response in zip(logprobs_of(shared, role), QUERIES, RESPONSES, strict=True):
            torch.testing.assert_close(found.tolist(), slow_logprobs(alone, query, response), atol=2e-5, rtol=1e-5)


def test_reference_stays_while_the_policy_is_trained(shared: SharedBase) -> None:
    """Even where the initial policy is itself an adapter, and disabling adapters would not give it."""
    before = logprobs_of(shared, "reference")
    disturb(shared)
    torch.testing.assert_close(logprobs_of(shared, "reference"), before, atol=0, rtol=0)
    assert all((new - old).abs().max() > 1e-3 for new, old in zip(logprobs_of(shared, "policy"), before, strict=True))


def test_value_model_starts_as_the_reward_model(shared: SharedBase) -> None:
    """Reference, defects 8 and 9: neither a head of zeros nor a random one. The value before token t is the reward
    of the text up to it."""
    for found, query, response in zip(values_of(shared), QUERIES, RESPONSES, strict=True):
        texts = [query + response[:t] for t in range(len(response))]
        torch.testing.assert_close(found, rewards_of(shared, texts), atol=1e-5, rtol=1e-5)
        assert found.abs().min() > 1e-4


def test_rewards_are_those_of_the_reward_model(shared: SharedBase, plain: Model, reward_folder: Path) -> None:
    texts = [query + response for query, response in zip(QUERIES, RESPONSES, strict=True)]
    alone = models.load_reward_model(plain, reward_folder, "cpu", trainable=False)
    expected = reward_model.score(alone, texts, 2, "cpu")
    torch.testing.assert_close(rewards_of(shared, texts), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 1e-3  # they differ, so that a mixed-up order would show
    disturb(shared)
    torch.testing.assert_close(rewards_of(shared, texts), expected, atol=1e-5, rtol=1e-5)


def test_entropy_is_that_of_the_tempered_distribution(shared: SharedBase) -> None:
    with torch.no_grad(), shared.use("policy"):
        _, entropies = shared.logprobs(QUERIES[:1], RESPONSES[:1], TEMPERATURE, with_entropy=True)
        assert entropies is not None
        logits = shared.lm(input_ids=torch.tensor([QUERIES[0]])).logits[0, -1].double()
    logprobs = torch.log_softmax(logits / TEMPERATURE, 0)
    assert entropies[0, 0].item() == pytest.approx(float(-(logprobs.exp() * logprobs).sum()), abs=1e-5)


def test_padding_does_not_matter(shared: SharedBase) -> None:
    """Rows in a batch, padded on both sides, against each row alone."""
    disturb(shared)
    alone = [[row] for row in range(len(QUERIES))]
    for found, single in (
        (logprobs_of(shared, "policy"), [logprobs_of(shared, "policy", *pick(rows))[0] for rows in alone]),
        (logprobs_of(shared, "reference"), [logprobs_of(shared, "reference", *pick(rows))[0] for rows in alone]),
        (values_of(shared), [values_of(shared, *pick(rows))[0] for rows in alone]),
        (list(rewards_of(shared, QUERIES)), [rewards_of(shared, [query])[0] for query in QUERIES]),
    ):
        torch.testing.assert_close(found, single, atol=2e-5, rtol=1e-5)


def pick(rows: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    return [QUERIES[row] for row in rows], [RESPONSES[row] for row in rows]


# -- training


def backward(shared: SharedBase, role: Role) -> None:
    """The gradient of a sum over real tokens, each with a different weight, so none cancels another."""
    with shared.use(role):
        found = (
            shared.logprobs(QUERIES, RESPONSES, TEMPERATURE)[0]
            if role == "policy"
            else shared.values(QUERIES, RESPONSES)
        )
        loss = sum(
            (row[: len(response)] * torch.arange(1, len(response) + 1)).sum()
            for row, response in zip(found, RESPONSES, strict=True)
        )
        assert isinstance(loss, torch.Tensor)
        loss.backward()


def with_gradient(shared: SharedBase) -> set[str]:
    return {name for name, p in shared.named_parameters() if p.grad is not None and bool(p.grad.any())}


def lora_names(shared: SharedBase, adapter: str) -> set[str]:
    return {name for name, _ in shared.named_parameters() if f".{adapter}.weight" in name and "lora_" in name}


def test_each_loss_reaches_its_own_adapter(shared: SharedBase) -> None:
    disturb(shared)
    shared.train()
    policy, value = lora_names(shared, "default"), lora_names(shared, "value") | {"value_head"}
    assert len(policy) == len(value) - 1 == 2 * 2 * 7  # A and B of 7 linear layers in each of 2 blocks
    # The last block's output feeds the head; its value is read before the last token is known: all take part.
    backward(shared, "policy")
    assert with_gradient(shared) == policy
    shared.zero_grad()
    backward(shared, "value")
    assert with_gradient(shared) == value
    shared.zero_grad()
    backward(shared, "policy")
    backward(shared, "value")
    assert with_gradient(shared) == policy | value
    assert {id(p) for p in shared.trained()} == {id(p) for p in shared.parameters() if p.requires_grad}
    assert {name for name, p in shared.named_parameters() if p.requires_grad} == policy | value


def test_only_what_is_trained_wants_gradients_whatever_was_active(shared: SharedBase) -> None:
    wanted = {id(parameter) for parameter in shared.trained()}
    for role in ("policy", "reference", "value", "reward", "reference"):
        with shared.use(role):
            assert {id(p) for p in shared.parameters() if p.requires_grad} <= wanted
        assert {id(p) for p in shared.parameters() if p.requires_grad} == wanted


def test_policy_gradient_is_that_of_a_plain_model(shared: SharedBase, plain: Model, tmp_path: Path) -> None:
    """Log probabilities by another path: rows alone, all logits, cross entropy, in float64."""
    disturb(shared)
    shared.save_policy(tmp_path)
    backward(shared, "policy")
    alone = PeftModel.from_pretrained(models.load_base(plain, "cpu"), str(tmp_path), is_trainable=True).double()
    for query, response in zip(QUERIES, RESPONSES, strict=True):
        logits = alone(input_ids=torch.tensor([query + response])).logits[0, len(query) - 1 : -1] / TEMPERATURE
        losses = nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none")
        (-losses * torch.arange(1, len(response) + 1)).sum().backward()
    expected = {name: p for name, p in alone.named_parameters() if p.requires_grad}
    found = {name: p for name, p in shared.lm.named_parameters() if name in expected}
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert relative(gradients([found[name]]), gradients([parameter])) < 1e-5, name


def test_value_gradient_is_that_of_a_plain_reward_model(shared: SharedBase, plain: Model, reward_folder: Path) -> None:
    """A value model, still as it started, is a reward model: the gradient of its values, row by row, in float64."""
    backward(shared, "value")
    alone = models.load_reward_model(plain, reward_folder, "cpu", trainable=True).double()
    alone.train()
    for query, response in zip(QUERIES, RESPONSES, strict=True):
        for t in range(len(response)):
            value = alone(input_ids=torch.tensor([query + response[:t]]), use_cache=False).logits[0, 0]
            ((t + 1) * value).backward()
    expected = {name.replace("default", "value"): p for name, p in alone.named_parameters() if p.requires_grad}
    (head,) = [name for name in expected if "score" in name]
    assert relative(gradients([shared.value_head]), gradients([expected.pop(head)])) < 1e-5
    found = {name: p for name, p in shared.lm.named_parameters() if name in expected}
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert relative(gradients([found[name]]), gradients([parameter])) < 1e-5, name


def test_gradient_checkpointing_changes_no_gradient(shared: SharedBase) -> None:
    disturb(shared)
    shared.train()

    def both() -> torch.Tensor:
        shared.zero_grad()
        backward(shared, "policy")
        backward(shared, "value")
        return gradients(shared.trained())

    without = both()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    layer = shared.lm.get_base_model().model.layers[0].mlp
    layer.register_forward_pre_hook(count)
    shared.lm.gradient_checkpointing_enable({"use_reentrant": False})
    assert relative(both(), without) < 1e-6
    assert calls == 4  # a forward pass and its repetition, for two losses: checkpointing was on


def test_no_dropout_in_training(plain: Model, adapter_folder: Path, reward_folder: Path) -> None:
    """As long as nothing has changed, the ratio of new to old policy must be 1."""
    lora = LORA.model_copy(update={"dropout": 0.5})
    shared = SharedBase(settings(plain, adapter_folder, "fresh"), lora, reward_folder, torch.device("cpu"), seed=1)
    assert [module.p for module in shared.modules() if isinstance(module, nn.Dropout)].count(0.5) == 14
    disturb(shared)
    before = logprobs_of(shared, "policy")
    shared.train()
    torch.testing.assert_close(logprobs_of(shared, "policy"), before, atol=0, rtol=0)


def test_a_model_with_learned_positions_and_dropout_inside_attention(plain: Model, tmp_path: Path) -> None:
    """GPT-2: another name for the backbone, absolute positions, dropout without a separate module."""
    shutil.copytree(plain.base, tmp_path / "gpt2", ignore=shutil.ignore_patterns("*config.json", "*.safetensors"))
    shutil.copy(Path(plain.base) / "tokenizer_config.json", tmp_path / "gpt2")
    torch.manual_seed(0)
    size = {"vocab_size": 400, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    config = GPT2Config(**size, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = plain.model_copy(update={"base": str(tmp_path / "gpt2")})
    folder = save_randomised(models.new_reward_model(model, LORA, "cpu", 3), tmp_path / "reward-model")
    shared = SharedBase(model, LORA, folder, torch.device("cpu"), seed=1)
    disturb(shared)
    together = logprobs_of(shared, "policy"), values_of(shared)
    alone = [pick([row]) for row in range(len(QUERIES))]
    single = [logprobs_of(shared, "policy", *row)[0] for row in alone], [values_of(shared, *row)[0] for row in alone]
    torch.testing.assert_close(together, single, atol=2e-5, rtol=1e-5)
    shared.train()
    torch.testing.assert_close((logprobs_of(shared, "policy"), values_of(shared)), together, atol=0, rtol=0)


# -- 16 and 4 bits


def test_float16_is_refused(plain: Model, adapter_folder: Path, reward_folder: Path) -> None:
    """Losses are divided by all tokens of a minibatch: most gradients would be 0, and nothing would say so."""
    model = settings(plain, adapter_folder, "adapter").model_copy(update={"dtype": "float16"})
    with pytest.raises(UserError, match=r"model\.dtype is float16, .* set it to bfloat16"):
        SharedBase(model, LORA, reward_folder, torch.device("cpu"), seed=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_four_bit_gradients_after_a_forward_pass_in_eval_mode(
    plain: Model, adapter_folder: Path, reward_folder: Path, dtype: str
) -> None:
    """The order in PPO: sample, then train. On some CPUs bitsandbytes would leave all gradients zero (models.prepare).

    Against a model with the same 4-bit weights, written out in float32: only the rounding of `dtype` remains.
    """
    model = settings(plain, adapter_folder, "adapter", quantization="nf4", dtype=dtype)
    shared = SharedBase(model, LORA, reward_folder, torch.device("cpu"), seed=1)
    for role in ("policy", "reference"):
        logprobs_of(shared, role)
    values_of(shared)
    rewards_of(shared, QUERIES)
    shared.train()
    backward(shared, "policy")
    backward(shared, "value")
    trained = {name for name, p in shared.named_parameters() if p.requires_grad}
    assert with_gradient(shared) == trained
    assert {p.dtype for p in shared.parameters() if p.requires_grad} == {torch.float32}  # in bfloat16, steps vanish
    with torch.no_grad(), shared.use("policy"):  # the activations, which take the memory
        output = shared(input_ids=torch.tensor(QUERIES[:1]), output_hidden_states=True)
    assert {each.dtype for each in (*output.hidden_states, output.logits)} == {getattr(torch, dtype)}

    written_out = SharedBase(
        settings(plain, adapter_folder, "adapter"), LORA, reward_folder, torch.device("cpu"), seed=1
    )
    copy_base(shared, written_out)
    backward(written_out, "policy")
    backward(written_out, "value")
    expected = dict(written_out.named_parameters())
    tolerance = 0.1 if dtype == "bfloat16" else 1e-3
    for name, parameter in shared.named_parameters():
        if name in trained:
            assert relative(gradients([parameter]), gradients([expected[name]])) < tolerance, name
    found, right = (
        gradients([model.get_parameter(name) for name in sorted(trained)]) for model in (shared, written_out)
    )
    alike = torch.nn.functional.cosine_similarity(found, right, dim=0)
    assert alike > (0.999 if dtype == "bfloat16" else 0.99999)


def copy_base(source: SharedBase, target: SharedBase) -> None:
    """Give `target` the base weights of `source`, which are in 4 bits."""
    from bitsandbytes.functional import dequantize_4bit

    weights = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "lora_" not in name:
                found = weights[name]
                state = getattr(found, "quant_state", None)
                parameter.copy_(found if state is None else dequantize_4bit(found.data, state))


def test_four_bit_policy_and_reference_start_equal(plain: Model, adapter_folder: Path, reward_folder: Path) -> None:
    """Whether the reference is an adapter or the bare base: the first KL is exactly 0."""
    for kind in ("adapter", "fresh"):
        model = settings(plain, adapter_folder, kind, quantization="nf4", dtype="bfloat16")
        shared = SharedBase(model, LORA, reward_folder, torch.device("cpu"), seed=1)
        torch.testing.assert_close(logprobs_of(shared, "policy"), logprobs_of(shared, "reference"), atol=0, rtol=0)
        alone = models.load_initial_policy(model, "cpu")
        found = torch.cat(logprobs_of(shared, "policy"))
        slow = [slow_logprobs(alone, query, response) for query, response in zip(QUERIES, RESPONSES, strict=True)]
        # bfloat16 has 8 bits: logits of size 10 differ by a few hundredths between two orders of summation.
        assert (found - torch.tensor([value for row in slow for value in row])).abs().max() < 0.5


# -- files


def test_saved_policy_is_an_ordinary_adapter(shared: SharedBase, plain: Model, tmp_path: Path) -> None:
    disturb(shared)
    shared.save_policy(tmp_path / "policy")
    names = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    assert not [name for name in names if "value" in name or "reward" in name or "score" in name]
    assert not [path for path in (tmp_path / "policy").iterdir() if path.is_dir()]  # of the other adapters
    alone = PeftModel.from_pretrained(models.load_base(plain, "cpu"), str(tmp_path / "policy")).eval()
    tokens = torch.tensor([QUERIES[0] + RESPONSES[0]])
    with torch.no_grad(), shared.use("policy"):
        torch.testing.assert_close(shared.lm(input_ids=tokens).logits, alone(input_ids=tokens).logits, atol=0, rtol=0)


def test_saved_policy_can_be_the_next_initial_policy(
    shared: SharedBase, plain: Model, reward_folder: Path, tmp_path: Path
) -> None:
    disturb(shared)
    shared.save_policy(tmp_path)
    again = SharedBase(
        plain.model_copy(update={"adapter": str(tmp_path)}), LORA, reward_folder, torch.device("cpu"), seed=2
    )
    for role in ("policy", "reference"):
        torch.testing.assert_close(logprobs_of(again, role), logprobs_of(shared, "policy"), atol=1e-6, rtol=0)


def test_what_is_trained_comes_back_exactly(shared: SharedBase, tmp_path: Path) -> None:
    disturb(shared)
    before = [parameter.detach().clone() for parameter in shared.trained()]
    shared.save_trained(tmp_path / "trained.safetensors")
    disturb(shared)
    shared.load_trained(tmp_path / "trained.safetensors")
    assert all(torch.equal(new, old) for new, old in zip(shared.trained(), before, strict=True))


@contextmanager
def damaged(folder: Path, target: Path, remove: str) -> Iterator[Path]:
    shutil.copytree(folder, target)
    file = target / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if remove not in name}
    file.unlink()
    if kept:
        save_file(kept, file, {"format": "pt"})
    yield target


@pytest.mark.parametrize(("remove", "finding"), [("score", "no head"), ("", "is missing")])
def test_a_reward_model_without_head_is_refused(
    plain: Model, reward_folder: Path, tmp_path: Path, remove: str, finding: str
) -> None:
    """Reference, defect 8: never a random head."""
    with (
        damaged(reward_folder, tmp_path / "damaged", remove) as folder,
        pytest.raises(UserError, match=f"damaged.*{finding}"),
    ):
        SharedBase(plain, LORA, folder, torch.device("cpu"), seed=1)
