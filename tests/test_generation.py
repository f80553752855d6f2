"""The sampler against a slow reference, and what its docstring promises."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from salmon import batching, caches, encoding, generation, models
from salmon.config import Model, PolicyPrompt
from salmon.errors import UserError
from salmon.generation import Generation, end_tokens, generate, replay
from salmon.tokenizers import load_tokenizer
from tests.small_models import CHATML_TOKENS, byte_tokenizer

LENGTHS = (3, 41, 12, 7, 25)


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> Model:
    return Model(base=str(tiny_model), quantization="none", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(settings: Model) -> Any:
    return load_tokenizer(settings)


@pytest.fixture(scope="module")
def model(settings: Model) -> nn.Module:
    return models.load_initial_policy(settings, "cpu").double()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [[1, *rng.integers(3, 300, length - 1).tolist()] for length in LENGTHS]


class Scripted(nn.Module):
    """A "model" that says given tokens, one list per row, whatever the prompt: a row is known by its first token."""

    def __init__(self, vocabulary: int, lines: dict[int, list[int]]) -> None:
        super().__init__()
        self.vocabulary, self.lines, self.sizes = vocabulary, lines, list[int]()
        self.eval()

    def forward(self, input_ids: Any, attention_mask: Any, past_key_values: Any, **_: Any) -> SimpleNamespace:
        if past_key_values is None:
            first = [int(row[mask.bool()][0]) for row, mask in zip(input_ids, attention_mask, strict=True)]
            past_key_values = Rows(first)
        said = past_key_values.said
        past_key_values.said += 1
        self.sizes.append(len(past_key_values.rows))
        logits = torch.zeros(len(past_key_values.rows), 1, self.vocabulary)
        for place, row in enumerate(past_key_values.rows):
            logits[place, 0, self.lines[row][said]] = 100.0
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)


class Rows:
    """A "cache" that remembers which rows are left."""

    def __init__(self, rows: list[int]) -> None:
        self.rows, self.said = rows, 0

    def reorder_cache(self, indices: torch.Tensor) -> None:
        self.rows = [self.rows[index] for index in indices.tolist()]


def slow(model: nn.Module, prompt: list[int], seed: int, limit: int, temperature: float, top_p: float) -> list[int]:
    """One row, no cache, no padding; the distribution is inverted in plain Python."""
    uniforms = np.random.default_rng(seed).random(limit)
    tokens: list[int] = []
    while len(tokens) < limit and 2 not in tokens:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].double()
        if temperature == 0:
            tokens.append(int(logits.argmax()))
            continue
        probabilities = dict(enumerate(torch.softmax(logits / temperature, 0).tolist()))
        kept, share = set[int](), 0.0
        for token in sorted(probabilities, key=lambda token: -probabilities[token]):
            if share >= top_p:
                break
            kept.add(token)
            share += probabilities[token]
        wanted, reached = uniforms[len(tokens)] * share, 0.0
        for token in sorted(kept):
            reached += probabilities[token]
            if reached > wanted:
                tokens.append(token)
                break
    return tokens


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.5, 0.8), (0.0, 1.0)])
def test_equals_slow_reference(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    temperature: float,
    top_p: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caches, "ROOM", 4)  # tokens after which a cache grows again
    limits = [20, 9, 1, 30, 15]
    expected = [
        slow(model, prompt, seed, limit, temperature, top_p)
        for seed, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    for batch_size, refill in ((5, 0.25), (2, 0.25), (3, 0.5), (2, 1.0)):
        found = generate(
            model,
            tokenizer,
            prompts,
            range(5),
            batch_size=batch_size,
            max_new_tokens=limits,
            temperature=temperature,
            top_p=top_p,
            device="cpu",
            refill=refill,
        )
        assert [row.tokens for row in found] == expected
        assert [row.finish_reason for row in found] == ["eos" if 2 in tokens else "length" for tokens in expected]


@pytest.mark.parametrize(
    ("refill", "calls"),
    [
        # Of four rows of 8 tokens, two end after two calls; two of 7 and 5 join, the first ends at once, and one of 4
        # joins. In the end, that one is alone, without the padding that it had next to the others.
        (0.25, "4x8 4x1/9 2x7 1x4 4x1/10 4x1/11 3x1/12 1x1/8 1x1/9 1x1/10 1x1/11 1x1/12"),
        (1.0, "4x8 4x1/9 2x1/10 2x1/11 1x1/12 3x7 2x1/8 2x1/9 2x1/10 1x1/11 1x1/12 1x1/13 1x1/14 1x1/15"),
    ],
)
def test_rows_that_end_make_room(model: nn.Module, tokenizer: Any, refill: float, calls: str) -> None:
    """Calls of the model as rows x tokens to read / tokens in the cache and to read."""
    found = []

    def note(_: nn.Module, __: Any, named: dict[str, Any]) -> None:
        rows, tokens = named["input_ids"].shape
        width = named["attention_mask"].shape[1]
        found.append(f"{rows}x{tokens}" + (f"/{width}" if named["past_key_values"] else ""))

    limits = [5, 2, 2, 4, 1, 4, 9]
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        rows = generate(
            model,
            tokenizer,
            [[1] * length for length in (8, 8, 8, 8, 7, 5, 4)],
            range(7),
            batch_size=4,
            max_new_tokens=limits,
            temperature=0,
            device="cpu",
            refill=refill,
        )
    finally:
        hook.remove()
    assert [len(row.tokens) for row in rows] == limits
    assert found == calls.split()


def test_batches_drain_where_caches_cannot_be_joined(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Unknown(Scripted):
        """With a cache that is not transformers' own."""

    lines = {10: [9, 9, 9, 2], 11: [2], 12: [9, 2], 13: [9, 9, 2]}
    for _ in range(2):
        model = Unknown(len(tokenizer), lines)
        with caplog.at_level("INFO"):
            found = generate(
                model,
                tokenizer,
                [[row] for row in lines],
                range(4),
                batch_size=2,
                max_new_tokens=9,
                temperature=0,
                device="cpu",
            )
        assert [row.tokens for row in found] == list(lines.values())
        assert model.sizes == [2, 1, 1, 1, 2, 2, 1]
    assert caplog.text.count("Unknown: its caches cannot be joined") == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_row_does_not_depend_on_its_batch(
    settings: Model, tokenizer: Any, prompts: list[list[int]], dtype: torch.dtype
) -> None:
    policy = models.load_initial_policy(settings, "cpu").to(dtype)

    def sample(rows: Sequence[int], batch_size: int = 5) -> list[Generation]:
        return generate(
            policy,
            tokenizer,
            [prompts[row] for row in rows],
            [100 + row for row in rows],
            batch_size=batch_size,
            max_new_tokens=25,
            temperature=1.0,
            device="cpu",
        )

    together = sample(range(5))
    assert together == sample(range(5))
    assert together[::-1] == sample([4, 3, 2, 1, 0])
    assert together == [sample([row])[0] for row in range(5)]
    assert together == sample(range(5), 2) == sample(range(5), 3)
    assert len({tuple(row.tokens) for row in sample([1, 1])}) == 1
    other = generate(
        policy, tokenizer, prompts[:1], [1], batch_size=1, max_new_tokens=25, temperature=1.0, device="cpu"
    )
    assert together[0].tokens != other[0].tokens


def test_more_room_changes_no_earlier_token(model: nn.Module, tokenizer: Any, prompts: list[list[int]]) -> None:
    short, long = (
        generate(model, tokenizer, prompts, range(5), batch_size=5, max_new_tokens=room, temperature=1.0, device="cpu")
        for room in (5, 12)
    )
    assert [row.tokens for row in short] == [row.tokens[:5] for row in long]


def test_draws_follow_the_distribution() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 3
    logits[7] = -torch.inf
    draws = 20_000
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens = generation.sample_tokens(logits.expand(draws, -1), uniforms, 0.7, 1.0)
    shares = torch.bincount(tokens, minlength=40).double() / draws
    expected = torch.softmax(logits.double() / 0.7, 0)
    # Evenly spaced uniforms: each count is off by one draw at most.
    assert float((shares - expected).abs().max()) <= 1 / draws + 1e-9
    assert shares[7] == 0
    assert tokens.tolist() == sorted(tokens.tolist())  # inverted in the order of the vocabulary


@pytest.mark.parametrize("uniform", [0.0, 5e-324, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 1e-6])
def test_never_a_token_of_probability_zero(uniform: float, top_p: float) -> None:
    for possible in ([0], [9], [4], [2, 5], [0, 9]):
        logits = torch.full((1, 10), -torch.inf)
        logits[0, possible] = 1.0
        drawn = int(generation.sample_tokens(logits, torch.tensor([uniform]).double(), 1.0, top_p))
        assert drawn in possible


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    uniforms = torch.linspace(0, 0.999, 500, dtype=torch.float64)
    for top_p, kept in ((0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        drawn = generation.sample_tokens(logits.expand(500, -1), uniforms, 1.0, top_p)
        assert set(drawn.tolist()) == kept


def test_logits_that_are_not_finite_are_an_error(tokenizer: Any) -> None:
    class Broken(Scripted):
        def forward(self, *args: Any, **named: Any) -> SimpleNamespace:
            output = super().forward(*args, **named)
            output.logits[-1, 0, 5] = torch.nan
            return output

    broken = Broken(len(tokenizer), {1: [9, 9], 3: [9, 9]})
    with pytest.raises(UserError, match="not finite"):
        generate(broken, tokenizer, [[1], [3]], [0, 1], batch_size=2, max_new_tokens=2, temperature=1.0, device="cpu")


def say(tokenizer: Any, *texts: str, stop: Sequence[str], lead: str = "Hi\n") -> list[Generation]:
    """What `generate` makes of a model that says these texts, one per row, each followed by more."""
    lines = {
        10 + row: [*tokenizer(text, add_special_tokens=False)["input_ids"], 2, 2] for row, text in enumerate(texts)
    }
    start = tokenizer(lead, add_special_tokens=False)["input_ids"]
    return generate(
        Scripted(len(tokenizer), lines),
        tokenizer,
        [[row, *start] for row in lines],
        [0] * len(lines),
        batch_size=len(lines),
        max_new_tokens=max(map(len, lines.values())) - 1,
        temperature=0.5,
        stop=stop,
        device="cpu",
    )


@pytest.mark.parametrize(
    ("said", "stop", "text", "reason"),
    [
        ("A.\n\n### User\nB", "\n### User\n", "A.\n", "stop"),
        ("# A\n### List\n### Users\nB", "\n### User\n", "# A\n### List\n### Users\nB", "eos"),  # defect 13
        ("A ### User\nB", "\n### User\n", "A ### User\nB", "eos"),
        ("### User\nB", "\n### User\n", "", "stop"),  # the line break is the prompt's
        ("### User", "\n### User\n", "### User", "eos"),
        ("東京。大阪", "。", "東京", "stop"),
        ("a🙂b", "🙂", "a", "stop"),
        ("xxENDyy", "END", "xx", "stop"),
        ("one two STOP three", " STOP ", "one two", "stop"),
        ("", "\n### User\n", "", "eos"),
        ("END", "END", "", "stop"),
    ],
)
def test_stop_strings(tokenizer: Any, said: str, stop: str, text: str, reason: str) -> None:
    found = say(tokenizer, said, "C", stop=[stop])
    assert (found[0].text, found[0].finish_reason) == (text, reason)
    assert found[1] == Generation([*tokenizer("C", add_special_tokens=False)["input_ids"], 2], "C", "eos")
    spoken = tokenizer(said, add_special_tokens=False)["input_ids"]
    if reason == "eos":
        assert found[0].tokens == [*spoken, 2]
    else:
        # The tokens are those sampled, up to the first that completes the stop string, and no more.
        assert found[0].tokens == spoken[: len(found[0].tokens)]
        assert stop in "Hi\n" + tokenizer.decode(found[0].tokens)
        assert stop not in "Hi\n" + tokenizer.decode(found[0].tokens[:-1])


def test_another_engine_ends_where_ours_does(model: nn.Module, tokenizer: Any, prompts: list[list[int]]) -> None:
    """What it samples beyond our end is cut; if it stops too early, it is asked for more."""
    limits, stop = [20, 9, 1, 30, 15], ["e", "\n### User\n"]

    def sample(limits: list[int], stop: Sequence[str]) -> list[Generation]:
        options: dict[str, Any] = {"batch_size": 5, "temperature": 1.0, "device": "cpu"}
        return generate(model, tokenizer, prompts, range(5), max_new_tokens=limits, stop=stop, **options)

    expected = sample(limits, stop)
    assert len({each.finish_reason for each in expected}) > 1
    longer = [each.tokens for each in sample([limit + 20 for limit in limits], [])]
    logprobs = [[-float(place) for place in range(len(tokens))] for tokens in longer]
    options: dict[str, Any] = {"max_new_tokens": limits, "ends": end_tokens(model, tokenizer), "stop": stop}
    found = replay(tokenizer, prompts, list(zip(longer, logprobs, strict=True)), **options)
    for each, one, told in zip(found, expected, logprobs, strict=True):
        assert each == dataclasses.replace(one, logprobs=told[: len(one.tokens)])
    short = [(one.tokens[:-1], [-1.0] * (len(one.tokens) - 1)) for one in expected]
    assert replay(tokenizer, prompts, short, **options) == [None] * 5


@pytest.mark.parametrize(
    ("said", "stop", "text", "reason"),
    [
        ("Yes<|im_end|>\nmore", "<|im_end|>", "Yes", "stop"),
        ("<|im_end|>x", "<|im_end|>", "", "stop"),
        ("Yes<|im_end|>", "<|im_end|>\n", "Yes", "eos"),
        ("Yes<|im_end|>\nmore", "<|im_end|>\n", "Yes", "stop"),
        ("Yes.<|im_end|>", "s.<|im_end|>", "Ye", "stop"),
        ("No<|im_end|>", "s<|im_end|>", "No", "eos"),
        ("<|im_end|>", "\n<|im_end|>", "", "stop"),  # the line break is the prompt's
        ("A<|im_end|>\n<|im_start|>user\nB", "<|im_end|>\n<|im_start|>user", "A", "stop"),
        ("A<|im_end|><|im_end|>B", "<|im_end|>B", "A", "stop"),
        ("A<|im_start|>B<|im_end|>C", "<|im_end|>", "AB", "stop"),
        ("東京🙂<|im_end|>", "<|im_end|>", "東京🙂", "stop"),
        ("A<|im_end|><|im_start|>B", "<|im_end|><|im_start|>", "A", "stop"),
        ("A<|im_end|>B<|im_start|>", "<|im_end|><|im_start|>", "AB", "eos"),
        ("A.<|im_end|>\n<|im_start|>", ".<|im_end|>\n<|im_start|>", "A", "stop"),
    ],
)
def test_stop_strings_with_special_tokens(said: str, stop: str, text: str, reason: str) -> None:
    tokenizer = byte_tokenizer(special=CHATML_TOKENS)
    found = say(tokenizer, said, "C", "Go on.STOP.", stop=["STOP", stop])
    assert (found[0].text, found[0].finish_reason) == (text, reason)
    assert [(each.text, each.finish_reason) for each in found[1:]] == [("C", "eos"), ("Go on.", "stop")]
    spoken = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert found[0].tokens == (spoken[: len(found[0].tokens)] if reason == "stop" else [*spoken, 2])
    if reason == "stop":
        assert stop in "Hi\n" + tokenizer.decode(found[0].tokens)
        assert stop not in "Hi\n" + tokenizer.decode(found[0].tokens[:-1])


def test_a_stop_string_spelled_out_stops_too() -> None:
    tokenizer = byte_tokenizer(special=CHATML_TOKENS)
    spelled = [
        token for letter in "Yes<|im_end|>" for token in tokenizer(letter, add_special_tokens=False)["input_ids"]
    ]
    model = Scripted(len(tokenizer), {10: [*spelled, 9, 9]})
    options: Any = {
        "batch_size": 1,
        "max_new_tokens": len(spelled) + 1,
        "temperature": 0.0,
        "stop": ["<|im_end|>"],
        "device": "cpu",
    }
    assert generate(model, tokenizer, [[10]], [0], **options) == [Generation(spelled, "Yes", "stop")]


def test_first_of_several_stop_strings(tokenizer: Any) -> None:
    assert say(tokenizer, "a b c d", stop=["d", " c", "b c"])[0].text == "a "


def test_every_prefix_of_a_stop_string_is_no_stop(tokenizer: Any) -> None:
    stop = "\n### User\n"
    for end in range(1, len(stop)):
        found = say(tokenizer, "a" + stop[:end], stop=[stop])[0]
        assert (found.text, found.finish_reason) == ("a" + stop[:end], "eos")


def test_finished_rows_leave_the_batch(tokenizer: Any) -> None:
    model = Scripted(len(tokenizer), {10: [9, 9, 9, 9, 2], 11: [2], 12: [9, 9, 2], 13: [2]})
    found = generate(
        model,
        tokenizer,
        [[10], [11], [12], [13]],
        range(4),
        batch_size=4,
        max_new_tokens=9,
        temperature=1.0,
        device="cpu",
    )
    assert model.sizes == [4, 2, 2, 1, 1]
    assert [row.tokens for row in found] == [[9, 9, 9, 9, 2], [2], [9, 9, 2], [2]]
    assert [row.text == "" for row in found] == [False, True, False, True]


def test_end_tokens_of_the_generation_config(tokenizer: Any) -> None:
    model = Scripted(len(tokenizer), {10: [9, 30, 9]})
    model.generation_config = SimpleNamespace(eos_token_id=[2, 30])  # type: ignore[assignment]
    found = generate(model, tokenizer, [[10]], [0], batch_size=1, max_new_tokens=3, temperature=1.0, device="cpu")[0]
    assert (found.tokens, found.finish_reason) == ([9, 30], "eos")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_adapters_and_quantised_bases(
    tiny_model: Path, tokenizer: Any, prompts: list[list[int]], quantization: Any
) -> None:
    from peft import LoraConfig, get_peft_model

    settings = Model(base=str(tiny_model), quantization=quantization, dtype="bfloat16")
    base = models.load_initial_policy(settings, "cpu")

    def sample(model: nn.Module) -> list[Generation]:
        return generate(
            model, tokenizer, prompts, range(5), batch_size=5, max_new_tokens=8, temperature=1.0, device="cpu"
        )

    plain = sample(base)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    assert sample(adapted) == sample(adapted)
    assert [row.tokens for row in sample(adapted)] != [row.tokens for row in plain]
    with adapted.disable_adapter():
        assert sample(adapted) == plain


@pytest.mark.parametrize(
    "wrong",
    [
        {"seeds": [1]},
        {"max_new_tokens": 0},
        {"max_new_tokens": [1, 2, 3]},
        {"prompts": [[1], []]},
    ],
)
def test_wrong_calls(model: nn.Module, tokenizer: Any, wrong: dict[str, Any]) -> None:
    call: dict[str, Any] = {"prompts": [[1], [1, 5]], "seeds": [1, 2], "batch_size": 2, "max_new_tokens": 2}
    with pytest.raises(ValueError, match=r"prompt"):
        generate(model, tokenizer, **(call | wrong), temperature=1.0, device="cpu")


def test_training_mode_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"eval"):
        generate(
            Scripted(9, {}).train(),
            tokenizer,
            [[1]],
            [0],
            batch_size=1,
            max_new_tokens=1,
            temperature=1.0,
            device="cpu",
        )


def test_no_prompts(model: nn.Module, tokenizer: Any) -> None:
    assert generate(model, tokenizer, [], [], batch_size=2, max_new_tokens=5, temperature=1.0, device="cpu") == []


def test_batches_hold_every_row_once_longest_first() -> None:
    assert batching.batches([3, 9, 9, 1, 4], 2) == [[1, 2], [4, 0], [3]]
    assert batching.batches([], 2) == []


def test_batches_after_an_interruption_are_the_same() -> None:
    lengths = np.random.default_rng(0).integers(1, 9, 23).tolist()
    whole = batching.batches(lengths, 4)
    for done in whole:
        left = [row for row in range(23) if row not in done]
        again = [[left[place] for place in batch] for batch in batching.batches([lengths[row] for row in left], 4)]
        assert again == [batch for batch in whole if batch is not done]


def prompt_settings(template: str) -> PolicyPrompt:
    return PolicyPrompt(template=template, assistant_marker="### Dromedary", stop=["\n### User\n"])


def test_encode_prompt_from_a_preamble(tokenizer: Any) -> None:
    tokens = encoding.encode_prompt(tokenizer, "Why {Input}?", prompt_settings("policy.txt"), "Start.\n\n### User")
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens[1:]) == "Start.\n\n### User\nWhy {Input}?\n\n### Dromedary\n"


def test_encode_prompt_as_chat(settings: Model) -> None:
    tokenizer = load_tokenizer(settings)
    with pytest.raises(UserError, match="chat template"):
        encoding.encode_prompt(tokenizer, "Why?", prompt_settings("chat"), "")
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    tokens = encoding.encode_prompt(tokenizer, "Why?", prompt_settings("chat"), "")
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(tokens[1:]) == "[user] Why?\n[assistant] "


def test_context_of_the_model(model: nn.Module) -> None:
    models.check_context(model, 4096, "sampling.max_length")
    with pytest.raises(UserError, match=r"sampling\.max_length is 4097, but the model reads 4096"):
        models.check_context(model, 4097, "sampling.max_length")


def test_longer_rows_do_not_join_shorter_ones() -> None:
    """Padding by a negative number would silently cut off their first tokens."""
    short, long = torch.ones(2, 3, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)
    assert caches.join_masks(long, short).tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    with pytest.raises(ValueError, match="rows of 4 tokens join rows of 3"):
        caches.join_masks(short, long)
