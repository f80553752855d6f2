"""The judge against a slow reference, the cut of long prompts, and the script that runs it."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import polars as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from polars.testing import assert_frame_equal
from torch import nn

import judge_preferences
from salmon import config, figures, judging, margins, models, principles, templates
from salmon.errors import UserError
from salmon.judging import Judge, Pair, PairPrompts
from salmon.principles import JudgedPrinciple
from salmon.tables import JUDGEMENTS, RESPONSES
from salmon.tokenizers import load_tokenizer
from salmon.work import WorkFolder
from tests.running import command, kill_at_first_part, launch

ROOT = Path(__file__).parents[1]
TEMPLATE = (
    "You are to select the preferred output for the instruction:\n{UserInstruction}\n# Output (a)\n{OutputA}\n"
    "# Output (b)\n{OutputB}\n# Principle\n{Dimension}: {Definition}\nThe more {Dimension} output is Output ("
)
WORDS = ["Saturn", "has", "the", "brightest", "rings", "and", "every", "piece", "東京", "🙂", "{OutputA}", "naïve", "#"]
PRINCIPLES = [
    JudgedPrinciple(dimension=name, definition=text, negative_definition=f"not {text}")
    for name, text in (("Concise", "short"), ("Honest", "true, every piece of it"), ("Helpful and kind", "of use"))
]
DIMENSIONS = [principle.dimension for principle in PRINCIPLES]


def words(rng: np.random.Generator, number: int) -> str:
    return " ".join(rng.choice(WORDS, number))


def make_pairs(lengths: list[tuple[int, int, int]]) -> list[Pair]:
    rng = np.random.default_rng(3)
    return [Pair(f"p{row}", *(words(rng, number) for number in each)) for row, each in enumerate(lengths)]


PAIRS = make_pairs([(3, 30, 5), (1, 2, 50), (12, 1, 1), (2, 7, 7), (20, 12, 40)])


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> config.Model:
    return config.Model(base=str(tiny_model), quantization="none", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(settings: config.Model) -> Any:
    return load_tokenizer(settings)


@pytest.fixture(scope="module")
def model(settings: config.Model) -> nn.Module:
    return models.load_initial_policy(settings, "cpu").double()


def make_judge(model: nn.Module, tokenizer: Any, template: str = TEMPLATE, max_length: int = 4096) -> Judge:
    return Judge(model, tokenizer, template=template, principles=PRINCIPLES, max_length=max_length, device="cpu")


def score(judge: Judge, pairs: list[Pair]) -> np.ndarray[Any, Any]:
    """Scores of pairs that fit: shape [pairs, principles, 2]."""
    return np.array(judge.judge(pairs), dtype=float)


def slow_margin(model: nn.Module, tokenizer: Any, principle: JudgedPrinciple, texts: tuple[str, str, str]) -> float:
    """logit(a) - logit(b) of one whole prompt, alone; slots are filled by cutting the template at them."""
    instruction, output_a, output_b = texts
    values = {
        "{UserInstruction}": instruction,
        "{OutputA}": output_a,
        "{OutputB}": output_b,
        "{Dimension}": principle.dimension,
        "{Definition}": principle.definition,
    }
    parts = TEMPLATE.replace("{", "\0{").replace("}", "}\0").split("\0")
    prompt = "".join(values.get(part, part) for part in parts)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    a, b = (tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in "ab")
    return float(logits[a] - logits[b])


@pytest.mark.parametrize("adapted", [False, True])
def test_equals_slow_reference(settings: config.Model, tokenizer: Any, adapted: bool) -> None:
    model = models.load_initial_policy(settings, "cpu").double()
    if adapted:
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, lora).double().eval()
    found = make_judge(model, tokenizer).judge(PAIRS)
    for pair, scores in zip(PAIRS, found, strict=True):
        assert scores is not None
        for principle, (s12, s21) in zip(PRINCIPLES, scores, strict=True):
            ab = slow_margin(model, tokenizer, principle, (pair.instruction, pair.output_1, pair.output_2))
            ba = slow_margin(model, tokenizer, principle, (pair.instruction, pair.output_2, pair.output_1))
            assert s12 == pytest.approx(ab, abs=1e-10)
            assert s21 == pytest.approx(-ba, abs=1e-10)
            assert abs(ab + ba) > 1e-6  # the reference tells the orders apart


def test_exchanged_outputs_exchange_the_orders(model: nn.Module, tokenizer: Any) -> None:
    judge = make_judge(model, tokenizer)
    exchanged = [Pair(pair.prompt_id, pair.instruction, pair.output_2, pair.output_1) for pair in PAIRS]
    np.testing.assert_allclose(score(judge, PAIRS), -score(judge, exchanged)[:, :, ::-1], atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_pair_does_not_depend_on_its_batch(
    settings: config.Model, tokenizer: Any, dtype: torch.dtype, tolerance: float
) -> None:
    judge = make_judge(models.load_initial_policy(settings, "cpu").to(dtype), tokenizer)
    together = score(judge, PAIRS)
    assert (together == score(judge, PAIRS)).all()
    np.testing.assert_allclose(together, np.concatenate([score(judge, [pair]) for pair in PAIRS]), atol=tolerance)


@pytest.mark.parametrize(
    "template",
    [
        "{Dimension} {Definition} {UserInstruction} {OutputA} {OutputB} (",  # the principle first: nothing shared
        "{UserInstruction} {OutputA} {OutputB} {Definition} {Dimension} (",
    ],
)
def test_any_template(model: nn.Module, tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.TEMPLATE", template)
    scores = make_judge(model, tokenizer, template).judge(PAIRS[:2])
    for pair, found in zip(PAIRS, scores, strict=False):
        texts = (pair.instruction, pair.output_1, pair.output_2)
        expected = [slow_margin(model, tokenizer, principle, texts) for principle in PRINCIPLES]
        assert found is not None
        assert [s12 for s12, _ in found] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("other", [[[4], [10, 11, 12, 13]], [[4, 5, 6], [4, 5, 7, 8]]])
def test_margins_where_nothing_is_shared(model: nn.Module, other: list[list[int]]) -> None:
    prompts = [[[5, 6, 7], [8, 9]], other]
    found = margins.margins(model, prompts, (20, 30), "cpu")
    for group, row in zip(prompts, found, strict=True):
        for prompt, margin in zip(group, row, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
            assert float(margin) == pytest.approx(float(logits[20] - logits[30]), abs=1e-10)


def test_the_common_prefix_is_computed_once(model: nn.Module, tokenizer: Any) -> None:
    judge = make_judge(model, tokenizer)
    prompts = judge.encode(PAIRS[4])
    assert prompts is not None
    shared = margins.common_prefix(prompts.order_12)
    computed = []
    handle = model.get_submodule("model.embed_tokens").register_forward_pre_hook(
        lambda _, ids: computed.append(ids[0].numel())
    )
    margins.margins(model, [prompts.order_12], judge.options, "cpu")
    handle.remove()
    assert computed == [shared, len(PRINCIPLES) * (max(map(len, prompts.order_12)) - shared)]
    assert tokenizer.decode(prompts.order_12[0][:shared]).endswith("# Principle\n")


def test_tails_see_the_head_and_themselves() -> None:
    seen = margins.tail_attention(torch.tensor([[0, 1, 1]]), torch.tensor([[[1, 1], [0, 1]]]))
    #        pad head  tail 1 tail 2
    assert seen[0, 0].int().tolist() == [
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_kernels(settings: config.Model, model: nn.Module, tokenizer: Any, attention: Any) -> None:
    policy = models.load_initial_policy(settings.model_copy(update={"attention": attention}), "cpu")
    np.testing.assert_allclose(
        score(make_judge(policy, tokenizer), PAIRS), score(make_judge(model, tokenizer), PAIRS), atol=1e-4
    )


@pytest.mark.parametrize(
    ("sequences", "length"),
    [
        ([[1, 2, 3]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1, 2, 3], [1, 2]], 1),
        ([[1, 2, 3], [1, 3, 3], [1, 2, 3, 4]], 1),
        ([[1, 2], [2, 2]], 0),
        ([[1], [1, 2]], 0),
    ],
)
def test_common_prefix(sequences: list[list[int]], length: int) -> None:
    assert margins.common_prefix(sequences) == length


def test_share_takes_from_the_longer_first() -> None:
    for first, second, budget in itertools.product(range(7), range(7), range(13)):
        kept = judging.share(first, second, budget)
        assert judging.share(second, first, budget) == kept[::-1]
        assert kept[0] <= first
        assert kept[1] <= second
        if first + second <= budget:
            assert kept == (first, second)
            continue
        assert budget - 1 <= sum(kept) <= budget
        for mine, other, had in ((kept[0], kept[1], first), (kept[1], kept[0], second)):
            assert mine == had or mine >= other  # only the longer one was cut


def decoded(tokenizer: Any, prompts: PairPrompts) -> list[list[str]]:
    return [
        [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in order]
        for order in (prompts.order_12, prompts.order_21)
    ]


@pytest.mark.parametrize("pair", PAIRS[:2] + PAIRS[3:])
def test_long_prompts_are_cut_in_the_outputs(model: nn.Module, tokenizer: Any, pair: Pair) -> None:
    whole = make_judge(model, tokenizer).encode(pair)
    empty = make_judge(model, tokenizer).encode(Pair(pair.prompt_id, pair.instruction, "", ""))
    assert whole is not None
    assert empty is not None
    longest, shortest = (max(map(len, each.order_12 + each.order_21)) for each in (whole, empty))
    assert make_judge(model, tokenizer, max_length=longest).encode(pair) == whole
    assert make_judge(model, tokenizer, max_length=shortest - 1).encode(pair) is None
    for max_length in range(shortest, longest):
        prompts = make_judge(model, tokenizer, max_length=max_length).encode(pair)
        assert prompts is not None
        lengths = [len(tokens) for tokens in prompts.order_12 + prompts.order_21]
        assert max(lengths) <= max_length
        # What is wasted: an odd token, and tokens that join differently where the texts were cut.
        assert max(lengths) > max_length - 8
        assert all(tokens[0] == tokenizer.bos_token_id for tokens in prompts.order_12 + prompts.order_21)
        cut = set()
        for order, texts in enumerate(decoded(tokenizer, prompts)):
            for principle, text in zip(PRINCIPLES, texts, strict=True):
                start = "You are to select the preferred output for the instruction:\n"
                start += f"{pair.instruction}\n# Output (a)\n"
                end = (
                    f"\n# Principle\n{principle.dimension}: {principle.definition}\n"
                    f"The more {principle.dimension} output is Output ("
                )
                assert text.startswith(start)
                assert text.endswith(end)
                outputs = text.removeprefix(start).removesuffix(end).split("\n# Output (b)\n")
                cut.add(tuple(outputs[::-1] if order else outputs))
        # The same outputs for every principle and in both orders: prefixes of the whole ones.
        assert len(cut) == 1
        (outputs_12,) = cut
        assert pair.output_1.startswith(outputs_12[0])
        assert pair.output_2.startswith(outputs_12[1])


def test_pairs_that_do_not_fit_leave_their_place(model: nn.Module, tokenizer: Any) -> None:
    long = Pair("long", words(np.random.default_rng(1), 300), "one", "two")
    judge = make_judge(model, tokenizer, max_length=700)
    first, none, last = judge.judge([PAIRS[0], long, PAIRS[1]])
    assert none is None
    np.testing.assert_allclose(np.array([first, last], dtype=float), score(judge, PAIRS[:2]), atol=1e-10)
    assert judge.judge([long]) == [None]


def test_options_in_context(tokenizer: Any) -> None:
    a, b = (tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ab")
    assert judging.option_tokens(tokenizer, ["Output (", "The output is ("]) == (a, b)
    assert tokenizer("Out")["input_ids"][-1] != tokenizer("Outa")["input_ids"][-1]


def test_options_that_join_with_the_template() -> None:
    """A tokenizer that has `(a` as one token: the letter's own token is what continues the prompt."""
    joining = word_tokenizer({"x": 0, "(": 1, "(a": 2, "a": 3, "b": 4}, merges=[("(", "a")])
    assert joining("x(a")["input_ids"] == [0, 2]
    assert judging.option_tokens(joining, ["x("]) == (3, 4)


def test_options_without_a_token() -> None:
    with pytest.raises(UserError, match="no single token for the options"):
        judging.option_tokens(word_tokenizer({"x": 0, "(": 1, "a": 2}, merges=[]), ["x("])


def word_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    unknown = {"<unk>": len(vocabulary)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary | unknown, merges=merges, unk_token="<unk>"))
    bpe.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")


def test_logits_that_are_not_finite_are_an_error(settings: config.Model, tokenizer: Any) -> None:
    broken = models.load_initial_policy(settings, "cpu")
    broken.get_parameter("lm_head.weight").data[:] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        make_judge(broken, tokenizer).judge(PAIRS[:1])


def test_our_template_is_shared_up_to_the_principle(model: nn.Module, tokenizer: Any) -> None:
    template = templates.read(ROOT / "prompts/templates/judge.txt")
    ours = principles.read_judged(ROOT / "prompts/principles/judge.json")
    judge = Judge(model, tokenizer, template=template, principles=ours, max_length=4096, device="cpu")
    prompts = judge.encode(PAIRS[4])
    assert prompts is not None
    assert tokenizer.decode(prompts.order_12[0][: margins.common_prefix(prompts.order_12)]).endswith(
        "#### Principle to consider\n\n"
    )


# The script.


def response_rows(pairs: list[Pair], which: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "prompt_id": [pair.prompt_id for pair in pairs],
            "source": "made up",
            "instruction": [pair.instruction for pair in pairs],
            "input": "",
            "response": [pair.output_2 if which else pair.output_1 for pair in pairs],
            "finish_reason": "eos",
            "prompt_tokens": 1,
            "response_tokens": 1,
        },
        schema=RESPONSES.schema,
    )


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "judge.txt").write_text(TEMPLATE + "\n")
    (tmp_path / "principles.json").write_text(json.dumps([principle.model_dump() for principle in PRINCIPLES]))
    return tmp_path


def write_responses(folder: Path, pairs: list[Pair]) -> None:
    for which in (0, 1):
        # Row order differs: nothing may be joined by position.
        response_rows(pairs[::-1] if which else pairs, which).write_parquet(folder / f"response{which}.parquet")


def options(folder: Path, settings: config.Model, output: str = "out.parquet", **more: Any) -> dict[str, Any]:
    judge = {"template": str(folder / "judge.txt"), "principles": str(folder / "principles.json"), "min_characters": 1}
    return {
        "response0": folder / "response0.parquet",
        "response1": folder / "response1.parquet",
        "principles": folder / "principles.json",
        "output": folder / output,
        "shard": more.pop("shard", 0),
        "model": settings,
        "batch_size": more.pop("batch_size", 2),
        "common": more.pop("common", False),
        "judge": config.Judge(**(judge | {"shards": 1} | more)),
    }


def run(folder: Path, settings: config.Model, output: str = "out.parquet", **more: Any) -> pl.DataFrame:
    judge_preferences.main(judge_preferences.Arguments(**options(folder, settings, output, **more)))
    return pl.read_parquet(folder / output)


def test_script_scores_every_pair_and_principle(
    work: Path, settings: config.Model, model: nn.Module, tokenizer: Any
) -> None:
    write_responses(work, PAIRS)
    table = run(work, settings)
    assert table.schema == JUDGEMENTS.schema
    assert table.select("prompt_id", "dimension").rows() == [(p.prompt_id, name) for p in PAIRS for name in DIMENSIONS]
    expected = score(make_judge(model, tokenizer), PAIRS).reshape(-1, 2)
    np.testing.assert_allclose(table.select("s12", "s21").to_numpy(), expected, atol=1e-4)
    manifest = json.loads((work / "out.manifest.json").read_text())
    assert manifest["counts"] == {
        "pairs": 5, "prompt_too_long": 0, "too_short": 0, "no_room": 0, "judged": 5, "cut": 0, "rows": 15
    }  # fmt: skip
    assert "batch_size" not in manifest["settings"]
    assert not (work / ".work").exists()


def test_script_counts_what_it_drops(work: Path, settings: config.Model) -> None:
    pairs = [
        PAIRS[0],
        Pair("short", "one", "long enough, this one", "short"),
        Pair("cut", "one", "long enough, this one", "short\n### User\nlong enough, this one"),
        Pair("heading", "one", "long enough, this one", "short\n### Users\nlong enough, this one"),
        Pair("no room", words(np.random.default_rng(1), 300), "long enough, this one", "long enough, this one"),
        Pair("too long", "one", words(np.random.default_rng(1), 300), "long enough, this one"),
        Pair("not sampled", "one", "", ""),
    ]
    write_responses(work, pairs)
    first = pl.read_parquet(work / "response0.parquet").with_columns(
        finish_reason=pl.when(prompt_id="not sampled").then(pl.lit("prompt_too_long")).otherwise("finish_reason")
    )
    first.write_parquet(work / "response0.parquet")
    table = run(work, settings, min_characters=6, max_length=700)
    assert table["prompt_id"].unique(maintain_order=True).to_list() == ["p0", "heading", "too long"]
    assert json.loads((work / "out.manifest.json").read_text())["counts"] == {
        "pairs": 7, "prompt_too_long": 1, "too_short": 2, "no_room": 1, "judged": 3, "cut": 1, "rows": 9
    }  # fmt: skip


def test_shards_are_a_partition(work: Path, settings: config.Model) -> None:
    write_responses(work, PAIRS)
    parts = [run(work, settings, f"{shard}.parquet", shard=shard, shards=3) for shard in range(3)]
    ids = [part["prompt_id"].unique(maintain_order=True).to_list() for part in parts]
    assert ids == [["p0", "p3"], ["p1", "p4"], ["p2"]]
    whole = pl.concat(parts).sort("prompt_id", maintain_order=True)
    np.testing.assert_allclose(whole["s12"], run(work, settings)["s12"], atol=1e-4)


def test_a_shard_without_rows(work: Path, settings: config.Model) -> None:
    write_responses(work, PAIRS[:1])
    table = run(work, settings, shard=1, shards=2)
    assert table.height == 0
    assert table.schema == JUDGEMENTS.schema
    assert json.loads((work / "out.manifest.json").read_text())["counts"]["pairs"] == 0
    with pytest.raises(UserError, match="no shard 2 of 2"):
        run(work, settings, shard=2, shards=2)


def test_quantised_judge(work: Path, tiny_model: Path) -> None:
    write_responses(work, PAIRS)
    table = run(work, config.Model(base=str(tiny_model), quantization="nf4", dtype="bfloat16"))
    assert table.height == 15
    assert table["s12"].is_finite().all()


def test_killed_and_resumed(work: Path, settings: config.Model) -> None:
    write_responses(work, make_pairs([(5, 60, 60)] * 40))
    expected = run(work, settings, "expected.parquet", batch_size=1)
    resumed = options(work, settings, "resumed.parquet", batch_size=1)
    parts = kill_at_first_part(command(judge_preferences, resumed), work / "resumed.parquet")
    original = Judge.judge
    with patch.object(Judge, "judge", autospec=True, side_effect=original) as again:
        judge_preferences.main(judge_preferences.Arguments(**resumed))
    assert again.call_count == 40 - parts
    assert pl.read_parquet(work / "resumed.parquet").equals(expected)
    assert (work / "resumed.parquet").read_bytes() == (work / "expected.parquet").read_bytes()
    assert not (work / ".work").exists()


def test_other_settings_start_anew(work: Path, settings: config.Model) -> None:
    write_responses(work, PAIRS)
    stale = WorkFolder(work / "out.parquet")
    stale.open("other settings")
    rows = [("p0", name, 99.0, 99.0) for name in DIMENSIONS]
    stale.write_part(pl.DataFrame(rows, schema=JUDGEMENTS.schema, orient="row"))
    assert 99.0 not in run(work, settings)["s12"]


@pytest.mark.ranks
def test_two_ranks_make_the_same_table(work: Path, settings: config.Model) -> None:
    write_responses(work, PAIRS)
    expected = run(work, settings, "one.parquet", batch_size=1)
    two = options(work, settings, "two.parquet", batch_size=1)
    done = launch(2, *command(judge_preferences, two)[1:])
    assert done.returncode == 0, done.stderr
    assert pl.read_parquet(work / "two.parquet").equals(expected)


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_that_hold_one_model_together_judge_alike(work: Path, settings: config.Model, dtype: Any) -> None:
    write_responses(work, PAIRS)
    settings = settings.model_copy(update={"dtype": dtype})
    expected = run(work, settings, "one.parquet", batch_size=2)
    two = options(work, settings, "two.parquet", batch_size=2) | {"tensor_parallel": True}
    done = launch(2, *command(judge_preferences, two)[1:])
    assert done.returncode == 0, done.stderr
    found = pl.read_parquet(work / "two.parquet")
    assert found.drop("s12", "s21").equals(expected.drop("s12", "s21"))
    for name in ("s12", "s21"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-4 if dtype == "float32" else 0.3)
        assert expected[name].std() > 0.1
        for table in (found, expected):
            assert is_of_float32(table[name].to_numpy())


def is_of_float32(margins: Any) -> bool:
    """Whether most margins have more digits than differences of 16-bit logits."""
    lowest = margins.astype(np.float32).view(np.uint32) & 0x3F
    return bool((lowest > 0).mean() > 0.7)


@pytest.mark.parametrize("kind", ["plain", "lora", "saved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_logits_of_the_options_are_float32_in_16_bits(settings: config.Model, kind: str, dtype: torch.dtype) -> None:
    """Against sums over the last hidden state and the weights, whatever adapter is on the output layer."""
    base: Any = models.load_initial_policy(settings, "cpu").to(dtype)
    model, backbone = base, base.model
    weight = base.lm_head.weight.float()
    if kind == "lora":
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"]))
        layer = model.get_output_embeddings()
        layer.lora_B["default"].weight.normal_(0, 0.1)
        weight = weight + 2 * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    if kind == "saved":
        kept = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = get_peft_model(base, kept)
        layer = model.get_output_embeddings().modules_to_save["default"]
        layer.weight.mul_(1.5)
        weight = layer.weight.float()
    prompts = [[[5, 6, 7, 8], [5, 6, 9]], [[11, 12], [11, 13, 14, 15, 16]]]
    for way in get_args(margins.Way):
        found = margins.margins(model.eval(), prompts, (20, 30), "cpu", way)
        for group, row in zip(prompts, found, strict=True):
            for prompt, margin in zip(group, row, strict=True):
                state = backbone(torch.tensor([prompt])).last_hidden_state[0, -1].double()
                expected = sum(float(x * w) for x, w in zip(state, (weight[20] - weight[30]).double(), strict=True))
                assert float(margin) == pytest.approx(expected, abs=0.03)  # rounding of hidden states in a batch
        assert is_of_float32(found.flatten().numpy())
    single = margins.margins(model, [[prompts[0][0]]], (20, 30), "cpu", "whole")
    state = backbone(torch.tensor([prompts[0][0]])).last_hidden_state[0, -1].double()
    assert float(single) == pytest.approx(float(state @ (weight[20] - weight[30]).double()), abs=1e-5)


def test_files_of_different_prompts(work: Path, settings: config.Model) -> None:
    write_responses(work, PAIRS)
    other = response_rows(PAIRS, 1)
    for changed, key in (
        (other.filter(pl.col("prompt_id") != "p3"), "p3"),
        (pl.concat([other, other.head(1).with_columns(prompt_id=pl.lit("new"))]), "new"),
        (other.with_columns(instruction=pl.when(prompt_id="p2").then(pl.lit("?")).otherwise("instruction")), "p2"),
    ):
        changed.write_parquet(work / "response1.parquet")
        with pytest.raises(
            UserError, match=rf"response0.*have different prompts: 1 .*prompt_id {key}; build both"
        ) as e:
            run(work, settings)
        assert "response1.parquet" in str(e.value)
    pl.concat([other, other.head(1)]).write_parquet(work / "response1.parquet")
    with pytest.raises(UserError, match=r"response1\.parquet has 2 rows of prompt_id p0"):
        run(work, settings)
    assert not (work / "out.parquet").exists()


def test_prompts_that_only_one_policy_answered(work: Path, settings: config.Model) -> None:
    """They are left out and counted; a prompt with two texts is still refused. The other pairs are judged as before."""
    write_responses(work, PAIRS)
    run(work, settings)
    whole = pl.read_parquet(work / "out.parquet")
    counts = json.loads((work / "out.manifest.json").read_text())["counts"]
    other = response_rows(PAIRS, 1)
    fewer = other.filter(pl.col("prompt_id") != "p3")
    pl.concat([fewer, other.head(1).with_columns(prompt_id=pl.lit("new"))]).write_parquet(work / "response1.parquet")
    run(work, settings, "common.parquet", common=True)
    found = json.loads((work / "common.manifest.json").read_text())["counts"]
    assert found["not_answered_by_both"] == 2
    assert found["pairs"] == counts["pairs"] + 1  # p3 and new instead of p3
    assert_frame_equal(pl.read_parquet(work / "common.parquet"), whole.filter(pl.col("prompt_id") != "p3"))
    (step,) = figures.steps("run_judgements", "one against two", found)
    left_out = ("prompt too long", "too short", "no room", "not answered by both")
    assert step.left_out == {why: found[why.replace(" ", "_")] for why in left_out if found[why.replace(" ", "_")]}
    assert (step.rows, step.kept) == (found["pairs"], found["judged"])
    assert step.rows == step.kept + sum(step.left_out.values())
    pictured = figures.funnel([step, replace(step, stage="another")]).pictures["funnel"].axes[0]
    assert [label.get_text() for label in pictured.get_yticklabels()] == [replace(step, stage="another").label]
    two_texts = pl.when(prompt_id="p2").then(pl.lit("?")).otherwise("instruction")
    other.with_columns(instruction=two_texts).write_parquet(work / "response1.parquet")
    with pytest.raises(UserError, match="1 of the first are not in the second, or have another text there"):
        run(work, settings, "third.parquet", common=True)


def test_damaged_files(work: Path, settings: config.Model) -> None:
    write_responses(work, PAIRS)
    file = work / "response1.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"response1\.parquet cannot be read: parquet"):
        run(work, settings)
    response_rows(PAIRS, 1).drop("response").write_parquet(file)
    with pytest.raises(UserError, match=r"response1\.parquet lacks columns: response"):
        run(work, settings)
    file.unlink()
    with pytest.raises(UserError, match=r"response1\.parquet does not exist"):
        run(work, settings)
