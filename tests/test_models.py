"""Every architecture of docs/models.md: each stage against one forward pass of transformers for each text alone.

The expectations come from the table; the numbers, from plain loops in this file.
"""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import AutoPeftModelForSequenceClassification, PeftModel, TaskType
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from salmon import adapters, judging, likelihood, models, reward_model
from salmon.config import Lora, Model
from salmon.errors import UserError
from salmon.generation import generate
from salmon.judging import Judge, Pair
from salmon.principles import JudgedPrinciple
from salmon.shared_base import SharedBase
from salmon.tokenizers import load_tokenizer
from tests import zoo
from tests.test_generation import slow

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (\w+) \| (packed|shared|whole) \| (yes|no) \|", flags=re.M)
ROWS = {name: (way, head) for name, way, head in ROW.findall((ROOT / "docs" / "models.md").read_text())}
EAGER = ("gemma2", "gpt_oss", "mpt", "bloom")
SINGLE = (*EAGER, "qwen3_moe", "qwen3_next")  # transformers cannot compute them in float64
SHORT = ("phi3_longrope", "llama_dynamic_rope")  # their texts stay within zoo.SHORT_CONTEXT
LORA = Lora(r=4, alpha=16.0)
CLOSE = {"rtol": 2e-4, "atol": 2e-4}  # float32, four layers; weights large enough that real errors exceed 0.05
TEMPLATE = "In: {UserInstruction}\n(a): {OutputA}\n(b): {OutputB}\nBy {Dimension}: {Definition}\nBetter: Output ("
PRINCIPLES = [
    JudgedPrinciple(dimension="Concise", definition="It is short.", negative_definition="It is long."),
    JudgedPrinciple(dimension="Kind", definition="It is kind to the city and its people.", negative_definition="No."),
    JudgedPrinciple(dimension="Fun", definition="It is fun.", negative_definition="It is not."),
]


@pytest.fixture(scope="module", params=ROWS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def settings(name: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp(name)
    zoo.build(name, folder)
    return Model(base=str(folder), quantization="none", dtype="float32", attention="eager" if name in EAGER else "sdpa")


@pytest.fixture(scope="module")
def plain(settings: Model) -> Any:
    """The model as anyone would load it."""
    return AutoModelForCausalLM.from_pretrained(settings.base, attn_implementation=settings.attention).eval()


@pytest.fixture(scope="module")
def tokenizer(settings: Model) -> Any:
    return load_tokenizer(settings)


def texts(tokenizer: Any, name: str) -> list[list[int]]:
    """Token ids of texts of different lengths, some longer than a window, if the model can read them."""
    words = ["the", "river", "and", "the", "city", "with", "many", "people", "in", "it"]
    lengths = (9, 3, 14) if name in SHORT else (30, 3, 14, 9)
    return [tokenizer(" ".join(words[i * k % 10] for i in range(k)))["input_ids"] for k in lengths]


def test_the_table_has_every_architecture_of_the_zoo() -> None:
    assert list(ROWS) == list(zoo.ARCHITECTURES)


@torch.no_grad()
def test_sampling(name: str, settings: Model, plain: Any, tokenizer: Any) -> None:
    """Rows that take the places of others and end at different times equal those of whole texts, token by token.

    Where layers have a window, some rows join when others are longer than it, and some outgrow it.
    """
    model, plain = models.load_initial_policy(settings, "cpu"), copy.deepcopy(plain)
    if name not in SINGLE:
        model, plain = model.double(), plain.double()
    prompts = [*texts(tokenizer, name), [5], [1, 9]]
    limits = [20, 9, 2, 7, 40, 6][-len(prompts) :]
    read = []  # number of new rows in each call that reads prompts
    hook = model.register_forward_pre_hook(
        lambda _, __, named: read.append(len(named["input_ids"])) if named["past_key_values"] is None else None,
        with_kwargs=True,
    )
    for temperature in (0.0, 1.0):
        answers = generate(
            model,
            tokenizer,
            prompts,
            range(len(prompts)),
            batch_size=3,
            max_new_tokens=limits,
            temperature=temperature,
            device="cpu",
        )
        for seed, (prompt, limit, answer) in enumerate(zip(prompts, limits, answers, strict=True)):
            assert answer.tokens == slow(plain, prompt, seed, limit, temperature, 1.0)
    hook.remove()
    assert read[0] == 3
    assert 1 in read  # it joined two others


@torch.no_grad()
def test_judging(name: str, settings: Model, plain: Any, tokenizer: Any) -> None:
    short = name in SHORT
    judge = Judge(
        models.load_initial_policy(settings, "cpu"),
        tokenizer,
        template="{UserInstruction} {OutputA} {OutputB} {Dimension} (" if short else TEMPLATE,
        principles=PRINCIPLES,
        max_length=zoo.SHORT_CONTEXT if short else 150,
        device="cpu",
    )
    proof = judging.prove(judge)
    assert proof.way == ROWS[name][0], proof
    judge.way = proof.way
    pairs = [
        Pair("1", "Say it.", "The city.", "The river is long."),
        Pair("2", "So?", "A poem " * 9, "many people " * 7),
    ]
    options = tokenizer.convert_tokens_to_ids(["a", "b"])
    for pair, scores in zip(pairs, judge.judge(pairs), strict=True):
        prompts = judge.encode(pair)
        assert prompts is not None
        assert scores is not None
        for number, (s12, s21) in enumerate(scores):
            first, second = (
                plain(input_ids=torch.tensor([order[number]])).logits[0, -1, options].double()
                for order in (prompts.order_12, prompts.order_21)
            )
            expected = torch.stack([first[0] - first[1], second[1] - second[0]])
            torch.testing.assert_close(torch.tensor([s12, s21]).double(), expected, **CLOSE)


@torch.no_grad()
def test_judging_in_bfloat16_is_packed_and_has_no_ties(tmp_path: Path) -> None:
    """Margins are those of float32 logits: in bfloat16, steps of 0.03 and more would make many of them equal."""
    zoo.build("llama", tmp_path)
    settings = Model(base=str(tmp_path), quantization="none", dtype="bfloat16")
    judge = Judge(
        models.load_initial_policy(settings, "cpu"),
        load_tokenizer(settings),
        template=TEMPLATE,
        principles=PRINCIPLES,
        max_length=150,
        device="cpu",
    )
    proof = judging.prove(judge)
    assert proof.way == "packed"
    pairs = [Pair(str(n), f"Say {n}.", "The city. " * (n + 1), "many people " * (12 - n)) for n in range(12)]
    for way in ("packed", "whole"):
        judge.way = way  # type: ignore[assignment]
        scores = [score for found in judge.judge(pairs) for both in found or () for score in both]
        assert len(set(scores)) == len(scores) == 72
        assert 0.0 not in scores


@pytest.fixture(scope="module")
def folder(name: str, settings: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved reward model whose LoRA and head matter."""
    model = models.new_reward_model(settings, LORA, "cpu", seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0.0, 0.1)
    assert adapters.uncovered(model) == []
    folder = tmp_path_factory.mktemp(f"{name}-rm")
    model.save_pretrained(str(folder))
    return folder


def slow_states(settings: Model, folder: Path, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Hidden states of each row alone under the saved LoRA, [T, hidden], by PEFT on the causal class."""
    base = AutoModelForCausalLM.from_pretrained(settings.base, attn_implementation=settings.attention)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    return [
        model.get_base_model().base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]
        for row in rows
    ]


@torch.no_grad()
def test_the_reward_model(name: str, settings: Model, tokenizer: Any, folder: Path) -> None:
    """Saved and loaded, in a batch and alone, by its own class and by PEFT's."""
    rows = texts(tokenizer, name)
    head = load_file(folder / "adapter_model.safetensors")["base_model.model.score.weight"][0]
    expected = torch.stack([states[-1] @ head for states in slow_states(settings, folder, rows)])
    assert expected.std() > 0.01
    model = models.load_reward_model(settings, folder, "cpu", trainable=False)
    for size in (1, len(rows)):
        torch.testing.assert_close(reward_model.score(model, rows, size, "cpu"), expected, **CLOSE)
    for some in ([0], [*range(len(rows))], [*reversed(range(len(rows)))]):
        in_two = model(**reward_model.collate_pairs([rows[row] for row in some], reward_model.Apart())).logits[:, 0]
        torch.testing.assert_close(in_two, expected[some], **CLOSE)
    if ROWS[name][1] == "yes":
        theirs = AutoPeftModelForSequenceClassification.from_pretrained(
            str(folder), num_labels=1, attn_implementation=settings.attention
        ).eval()
        found = torch.stack([theirs(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
        torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_rewards_of_texts_that_begin_alike(name: str, settings: Model, tokenizer: Any, folder: Path) -> None:
    """One beginning and many ends, read after a copied cache, in parts and together, against each text alone."""
    begins = [tokenizer(text)["input_ids"] for text in ("The city is old, and", "Many people " * 3)]
    ends = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" short", " and longer than it", " is")]
    groups = [[begin + end for end in ends] for begin in begins]
    flat = [row for group in groups for row in group]
    head = load_file(folder / "adapter_model.safetensors")["base_model.model.score.weight"][0]
    expected = torch.stack([states[-1] @ head for states in slow_states(settings, folder, flat)]).view(2, 3)
    model = models.load_reward_model(settings, folder, "cpu", trainable=False)
    for size in (1, 8):
        torch.testing.assert_close(reward_model.score_alike(model, groups, size, "cpu"), expected, **CLOSE)
        for group, wanted in zip(groups, expected, strict=True):
            torch.testing.assert_close(reward_model._score_ends(model, group, size, "cpu"), wanted, **CLOSE)


def test_rl(
    name: str, settings: Model, plain: Any, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards, log probabilities and values of batches, and the gradients of both losses for every trained weight.

    The output layer is called for a part of the tokens at a time, and gives what the whole model gives.
    """
    rows = texts(tokenizer, name)
    monkeypatch.setattr(likelihood, "LOGITS", 20 * plain.config.get_text_config().vocab_size)
    assert likelihood.has_apart(plain, torch.tensor(rows[0])[None, :2])
    shared = SharedBase(settings, LORA, folder, torch.device("cpu"), seed=0)
    head = load_file(folder / "adapter_model.safetensors")["base_model.model.score.weight"][0]
    with torch.no_grad():
        states = slow_states(settings, folder, rows)
        with shared.use("reward"):
            torch.testing.assert_close(shared.rewards(rows), torch.stack([s[-1] @ head for s in states]), **CLOSE)
        queries, responses = [row[: len(row) // 2] for row in rows], [row[len(row) // 2 :] for row in rows]
        for role in ("policy", "reference"):
            with shared.use(role):
                found, _ = shared.logprobs(queries, responses, 0.7)
            for row, query, logprobs in zip(rows, queries, found, strict=True):
                logits = plain(input_ids=torch.tensor([row])).logits[0, len(query) - 1 : -1] / 0.7
                expected = logits.log_softmax(-1).gather(-1, torch.tensor(row[len(query) :])[:, None])[:, 0]
                torch.testing.assert_close(logprobs[: len(expected)], expected, **CLOSE)
        with shared.use("value"):
            values = shared.values(queries, responses)
        for query, hidden, value in zip(queries, states, values, strict=True):
            expected = hidden[len(query) - 1 : -1] @ head
            torch.testing.assert_close(value[: len(expected)], expected, **CLOSE)
    shared.train()
    with shared.use("policy"):
        shared.logprobs(queries, responses, 0.7)[0].sum().backward()
    with shared.use("value"):
        shared.values(queries, responses).sum().backward()
    names = {id(parameter): key for key, parameter in shared.named_parameters()}
    # LoRA's first matrix has no gradient where the second is zero, as in a fresh policy.
    missing = [
        names[id(parameter)]
        for parameter in shared.trained()
        if not (".default." in names[id(parameter)] and "lora_A" in names[id(parameter)])
        and (parameter.grad is None or not parameter.grad.any())
    ]
    assert missing == []


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_vision", "qwen3_moe", "gpt_oss"])
def test_lora_reaches_what_it_should_and_nothing_else(kind: str, quantization: Any, tmp_path: Path) -> None:
    zoo.build(kind, tmp_path)
    attention: Any = "eager" if kind in EAGER else "sdpa"
    settings = Model(base=str(tmp_path), quantization=quantization, dtype="float32", attention=attention)
    model = adapters.add_lora(models.load_base(settings, "cpu"), LORA, TaskType.CAUSAL_LM)
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [key for key in trained if "vision" in key or "lm_head" in key or "embed" in key]
    layers = model.config.get_text_config().num_hidden_layers
    linear = {
        key.partition(".lora_")[0]
        for key in trained
        if re.search(r"experts|gate_proj|up_proj|down_proj|[qkvo]_proj", key)
    }
    assert len(linear) == layers * {"llama": 7, "gemma3_vision": 7, "qwen3_moe": 6, "gpt_oss": 6}[kind], sorted(linear)
    if kind in ("qwen3_moe", "gpt_oss"):
        with pytest.raises(UserError, match=r"lora\.dropout"):
            adapters.add_lora(models.load_base(settings, "cpu"), Lora(r=4, dropout=0.1), TaskType.CAUSAL_LM)


def test_dropout_of_the_base_is_off(tmp_path: Path) -> None:
    zoo.build("opt", tmp_path, dropout=0.5, attention_dropout=0.5)
    settings = Model(base=str(tmp_path), quantization="none", dtype="float32")
    model = models.load_base(settings, "cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits, atol=0, rtol=0)
    assert isinstance(model, nn.Module)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_gets_the_weights_that_4_bit_weights_stand_for(kind: str, dtype: Any, tmp_path: Path) -> None:
    """With tied and untied embeddings, with biases, and with experts that stay unchanged."""
    folder, written = tmp_path / "base", tmp_path / "written"
    zoo.build(kind, folder)
    settings = Model(base=str(folder), quantization="nf4", dtype=dtype)
    quantised = models.load_base(settings, "cpu")
    layers = {name: module for name, module in quantised.named_modules() if type(module).__name__ == "Linear4bit"}
    assert layers
    for module in layers.values():
        module.support_avx512bf16_for_cpu = False  # its kernel, where there is one, computes in bfloat16
    models.load_dequantized(settings, "cpu").save_pretrained(str(written))
    plain_settings = settings.model_copy(update={"base": str(written), "quantization": "none"})
    plain = models.load_base(plain_settings, "cpu")
    assert type(plain) is type(quantised)
    original = models.load_base(settings.model_copy(update={"quantization": "none"}), "cpu")
    ids = torch.tensor([[5, 6, 7, 8, 9, 4]])
    with torch.no_grad():
        expected, found, before = (model(ids).logits.float() for model in (quantised, plain, original))
    close = 1e-4 if dtype == "float32" else 0.05
    scale = (expected - before).abs().max()
    assert (found - expected).abs().max() < close * max(1.0, float(scale))
    assert scale > 4 * close, "the quantisation changes nothing that could be seen"
    for name, module in layers.items():
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(getattr(torch, dtype))
        assert torch.equal(plain.get_submodule(name).weight, weight)


def test_texts_are_read_whole_where_a_cache_gives_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.build("llama", tmp_path)
    settings = Model(base=str(tmp_path), quantization="none", dtype="float32")
    model = models.new_reward_model(settings, LORA, "cpu", seed=0).eval()
    groups = [[[1, 5, 6, 7], [1, 5, 8]], [[1, 9, 4], [1, 9, 4, 4]]]
    expected = torch.stack([reward_model.score(model, group, 8, "cpu") for group in groups])
    ends = reward_model._score_ends
    monkeypatch.setattr(reward_model, "_score_ends", lambda *given: ends(*given) + 0.1)
    torch.testing.assert_close(reward_model.score_alike(model, groups, 8, "cpu"), expected)


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """They would count as wrong answers: in a whole text, and in the end of one whose beginning is already computed."""
    zoo.build("llama", tmp_path)
    model = models.new_reward_model(
        Model(base=str(tmp_path), quantization="none", dtype="float32"), LORA, "cpu", seed=0
    ).eval()
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[8] = torch.inf
    with pytest.raises(UserError, match=r"scores are not finite; .*model\.dtype"):
        reward_model.score(model, [[1, 5], [1, 8]], 1, "cpu")
    with pytest.raises(UserError, match="scores are not finite"):
        reward_model.score_alike(model, [[[1, 5, 6], [1, 5, 7]], [[1, 5, 6], [1, 5, 8]]], 1, "cpu")
