"""The script that samples responses: its output, which only the settings decide."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

import sample_responses
from salmon import config, models, sampling, script
from salmon.errors import UserError
from salmon.generation import Generation, generate
from salmon.randomness import seed_of
from salmon.tables import RESPONSES
from salmon.tokenizers import load_tokenizer
from salmon.work import WorkFolder
from tests.running import command, kill_at_first_part, launch, on_a_full_disk

PREAMBLE = "A conversation.\n\n### User\n"
INSTRUCTIONS = [
    ("Which of the planets has rings?", ""),
    ("Why {Input}?", "Saturn has the brightest rings. " * 4),
    ("日本語", ""),
    ("Explain. " * 30, ""),  # too long for 90 tokens after the preamble
    ("one", ""),
    ("two, three", "4"),
    ("Please explain it in two or three sentences.", ""),
]


def table(instructions: list[tuple[str, str]]) -> pl.DataFrame:
    rows = [(f"id{row:02}", "made up", *texts) for row, texts in enumerate(instructions)]
    return pl.DataFrame(rows, schema=["prompt_id", "source", "instruction", "input"], orient="row")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    table(INSTRUCTIONS).write_parquet(tmp_path / "prompts.parquet")
    (tmp_path / "policy.txt").write_text(PREAMBLE)
    return tmp_path


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> config.Model:
    return config.Model(base=str(tiny_model), quantization="none", dtype="float32")


def options(folder: Path, model: config.Model, output: str = "out.parquet", **more: Any) -> dict[str, Any]:
    own = {"index": 0, "shard": 0, "batch_size": 2, "prompts": folder / "prompts.parquet"}
    own |= {name: more.pop(name) for name in [*own, "policy_prompt"] if name in more}
    return {
        "output": folder / output,
        "model": model,
        "sampling": config.Sampling(**({"max_length": 90, "shards": 1, "temperature": 1.0} | more)),
        "policy_prompt": config.PolicyPrompt(template=str(folder / "policy.txt"), stop=["\n### User\n", "st"]),
        **own,
    }


def longest(model: config.Model, preamble: str = PREAMBLE) -> int:
    """Tokens that a prompt of the table and its response may have: 90 more than the prompts' common beginning."""
    tokenizer = load_tokenizer(model)
    begun = zip(*(tokenizer(f"{preamble}{text}\n\n")["input_ids"] for text, _ in INSTRUCTIONS), strict=False)
    return next(place for place, tokens in enumerate(begun) if len(set(tokens)) > 1) + 90


def run(folder: Path, model: config.Model, output: str = "out.parquet", **more: Any) -> pl.DataFrame:
    sample_responses.main(sample_responses.Arguments(**options(folder, model, output, **more)))
    return pl.read_parquet(folder / output)


def counts(folder: Path, output: str = "out") -> dict[str, int]:
    found: dict[str, int] = json.loads((folder / f"{output}.manifest.json").read_text())["counts"]
    return found


def test_every_row_is_what_the_sampler_makes_of_it_alone(work: Path, model: config.Model) -> None:
    found = run(work, model)
    assert found.schema == RESPONSES.schema
    assert found.select("prompt_id", "source", "instruction", "input").equals(table(INSTRUCTIONS))
    tokenizer, policy = load_tokenizer(model), models.load_initial_policy(model, "cpu")
    room = longest(model)
    for row in found.iter_rows(named=True):
        text = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        prompt = tokenizer("A conversation.\n\n### User\n" + text + "\n\n### Dromedary\n")["input_ids"]
        assert row["prompt_tokens"] == len(prompt)
        if len(prompt) >= room:
            assert (row["response"], row["finish_reason"], row["response_tokens"]) == ("", "prompt_too_long", 0)
            continue
        (alone,) = generate(
            policy,
            tokenizer,
            [prompt],
            [seed_of("response", 42, row["prompt_id"])],
            batch_size=1,
            max_new_tokens=room - len(prompt),
            temperature=1.0,
            stop=["\n### User\n", "st"],
            device="cpu",
        )
        assert (row["response"], row["finish_reason"]) == (alone.text, alone.finish_reason)
        assert row["response_tokens"] == len(alone.tokens)
        assert row["prompt_tokens"] + row["response_tokens"] <= room
    reasons = dict(found["finish_reason"].value_counts().iter_rows())
    assert reasons["prompt_too_long"] == 1
    assert counts(work) == {"rows": 7, **reasons, "thinking_cut": 0}
    assert not (work / ".work").exists()


class Canned:
    """A sampler without a model; a prompt and its response together may have `room` tokens."""

    def __init__(self, room: int) -> None:
        self.room = room

    def sample(self, prompts: list[list[int]], seeds: list[int], **options: Any) -> list[Generation]:
        assert (options["temperature"], options["top_p"], options["stop"]) == (1.0, 1.0, ["\n### User\n", "st"])
        assert all(
            len(prompt) + limit == self.room for prompt, limit in zip(prompts, options["max_new_tokens"], strict=True)
        )
        return [Generation([7] * (1 + seed % 3), f"seed {seed}", "stop") for seed in seeds]


@pytest.mark.parametrize("preamble", [PREAMBLE, "You are kind. " * 30 + PREAMBLE])
def test_another_sampler_is_used_as_it_is(work: Path, model: config.Model, preamble: str) -> None:
    """A longer preamble leaves as much room for the response."""
    (work / "policy.txt").write_text(preamble)
    with (
        patch.object(sample_responses, "open_sampler", return_value=nullcontext(Canned(longest(model, preamble)))),
        patch.object(models, "load_initial_policy", side_effect=AssertionError("the model was loaded")),
    ):
        sampled = run(work, model)
    for row in sampled.filter(finish_reason="stop").iter_rows(named=True):
        seed = seed_of("response", 42, row["prompt_id"])
        assert (row["response"], row["response_tokens"]) == (f"seed {seed}", 1 + seed % 3)
    assert counts(work) == {"rows": 7, "stop": 6, "prompt_too_long": 1, "thinking_cut": 0}


def test_the_responses_differ_and_the_runs_do_not(work: Path, model: config.Model) -> None:
    first, again, second = (
        run(work, model, f"{name}.parquet", index=index) for name, index in (("a", 0), ("b", 0), ("c", 1))
    )
    assert (work / "a.parquet").read_bytes() == (work / "b.parquet").read_bytes()
    assert first.equals(again)
    assert not (first["response"] == second["response"]).filter(first["finish_reason"] != "prompt_too_long").any()
    other = run(work, model, "d.parquet", index=0, seeds=(42, 7))
    assert other.equals(first)  # the other response's seed does not matter
    manifest = json.loads((work / "c.manifest.json").read_text())
    assert manifest["settings"]["seed"] == 43
    assert "batch_size" not in manifest["settings"]


@pytest.mark.parametrize("shards", [2, 3])
def test_neither_shards_nor_batches_nor_order_matter(work: Path, model: config.Model, shards: int) -> None:
    expected = run(work, model)
    parts = [run(work, model, f"{n}.parquet", shard=n, shards=shards, batch_size=4) for n in range(shards)]
    assert [part["prompt_id"].to_list() for part in parts] == [
        expected["prompt_id"].to_list()[n::shards] for n in range(shards)
    ]
    assert pl.concat(parts).sort("prompt_id").equals(expected)
    table(INSTRUCTIONS)[::-1].write_parquet(work / "prompts.parquet")
    assert run(work, model, "reversed.parquet")[::-1].equals(expected)


def test_a_shard_without_rows(work: Path, model: config.Model) -> None:
    found = run(work, model, shard=8, shards=9)
    assert found.height == 0
    assert found.schema == RESPONSES.schema
    assert counts(work) == {"rows": 0, "thinking_cut": 0}
    with pytest.raises(UserError, match="no shard 9 of 9"):
        run(work, model, shard=9, shards=9)


def test_a_shard_of_prompts_without_room(work: Path, model: config.Model) -> None:
    found = run(work, model, max_length=5)
    assert found["finish_reason"].unique().to_list() == ["prompt_too_long"]
    assert counts(work) == {"rows": 7, "prompt_too_long": 7, "thinking_cut": 0}


def test_chat_template(work: Path, model: config.Model, tmp_path: Path) -> None:
    chat = config.PolicyPrompt(template="chat", stop=["\n"])
    with pytest.raises(UserError, match="has no chat template"):
        run(work, model, policy_prompt=chat)
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[assistant]"
    with patch.object(sample_responses, "load_tokenizer", return_value=tokenizer):
        found = run(work, model, policy_prompt=chat)
    length = len(tokenizer("[user] one[assistant]", add_special_tokens=False)["input_ids"])
    assert found.filter(instruction="one")["prompt_tokens"].to_list() == [length]


def test_quantised_policy(work: Path, tiny_model: Path) -> None:
    assert run(work, config.Model(base=str(tiny_model), quantization="nf4", dtype="bfloat16")).height == 7


def test_killed_and_resumed(work: Path, model: config.Model) -> None:
    table([(f"Which of the planets has rings, {row}?", "") for row in range(20)]).write_parquet(
        work / "prompts.parquet"
    )
    run(work, model, "expected.parquet", batch_size=1, max_length=150)  # 10 parts of 2
    resumed = options(work, model, "resumed.parquet", batch_size=1, max_length=150)
    parts = kill_at_first_part(command(sample_responses, resumed), work / "resumed.parquet")
    with patch.object(sampling, "generate", side_effect=generate) as again:
        sample_responses.main(sample_responses.Arguments(**resumed))
    assert again.call_count == 10 - parts
    assert (work / "resumed.parquet").read_bytes() == (work / "expected.parquet").read_bytes()
    assert not (work / ".work").exists()


def test_killed_and_started_with_other_weights(work: Path, tiny_model: Path) -> None:
    """The weights have the same size and name: nothing of the killed run is kept."""
    table([(f"Which of the planets has rings, {row}?", "") for row in range(20)]).write_parquet(
        work / "prompts.parquet"
    )
    folder = shutil.copytree(tiny_model, work / "model")
    model = config.Model(base=str(folder), quantization="none", dtype="float32")
    resumed = options(work, model, "resumed.parquet", batch_size=1, max_length=150)
    assert kill_at_first_part(command(sample_responses, resumed), work / "resumed.parquet")
    file = folder / "model.safetensors"
    size = file.stat().st_size
    torch.manual_seed(1)
    other = {name: torch.randn_like(tensor) / 5 for name, tensor in load_file(file).items()}
    save_file(other, file, metadata={"format": "pt"})
    assert file.stat().st_size == size
    with patch.object(sampling, "generate", side_effect=generate) as again:
        sample_responses.main(sample_responses.Arguments(**resumed))
    assert again.call_count == 10


@pytest.mark.parametrize(
    ("rows", "batch_size", "parts"),
    [(0, 4, 0), (7, 4, 1), (120, 4, 15), (200, 4, 16), (500, 4, 16), (512, 4, 16), (2000, 4, 63)],
)
def test_a_shard_is_sampled_in_calls_of_two_to_eight_batches(rows: int, batch_size: int, parts: int) -> None:
    size = sample_responses.rows_per_part(rows, batch_size)
    assert 2 * batch_size <= size <= 8 * batch_size
    assert -(-rows // size) == parts


@pytest.mark.parametrize("done", [{0, 1}, {2}])
def test_resumed_with_whole_batches(work: Path, model: config.Model, done: set[int]) -> None:
    """An interruption that leaves the parts of some of the sampler's calls, as ranks do."""
    run(work, model, "expected.parquet", batch_size=1)
    written: list[pl.DataFrame] = []

    class Interrupted(WorkFolder):
        def write_part(self, part: pl.DataFrame) -> None:
            if len(written) in done:
                super().write_part(part)
            written.append(part)

        def read_parts(self, schema: Any) -> pl.DataFrame:
            if len(written) == 3:
                raise KeyboardInterrupt
            return super().read_parts(schema)

    with patch.object(sample_responses, "WorkFolder", Interrupted), pytest.raises(KeyboardInterrupt):
        run(work, model, batch_size=1)
    assert not (work / "out.parquet").exists()
    with patch.object(sampling, "generate", side_effect=generate) as again:
        run(work, model, batch_size=1)
    assert again.call_count == 3 - len(done)
    assert (work / "out.parquet").read_bytes() == (work / "expected.parquet").read_bytes()


def test_other_settings_do_not_resume(work: Path, model: config.Model) -> None:
    def mark(changed: config.Model = model, **more: Any) -> str:
        origin = sample_responses.origin_of(sample_responses.Arguments(**options(work, changed, **more)))
        return origin.fingerprint(origin.identify())

    first = mark()
    assert mark(batch_size=7) == first
    assert mark(seeds=(42, 44)) == first
    assert mark(model.model_copy(update={"attention": "eager"})) == first
    for changed in (
        {"index": 1},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"max_length": 89},
        {"shards": 2},
        {"shard": 1},
    ):
        assert mark(**changed) != first
    (work / "policy.txt").write_text("Other.")
    assert mark() != first


@pytest.mark.ranks
def test_two_ranks_make_the_same_table(work: Path, model: config.Model) -> None:
    run(work, model, "one.parquet", batch_size=1)  # three calls of the sampler
    two = options(work, model, "two.parquet", batch_size=1)
    done = launch(2, *command(sample_responses, two)[1:])
    assert done.returncode == 0, done.stderr
    assert (work / "two.parquet").read_bytes() == (work / "one.parquet").read_bytes()
    assert counts(work, "two") == counts(work, "one")


@pytest.mark.ranks
def test_two_ranks_that_hold_one_model_together_make_the_same_table(work: Path, model: config.Model) -> None:
    """Tensor parallelism changes the order of sums, but changes no token here."""
    expected = run(work, model, "one.parquet", batch_size=3)  # six rows: new ones join others
    together = options(work, model, "two.parquet", batch_size=3) | {"tensor_parallel": True}
    done = launch(2, *command(sample_responses, together)[1:])
    assert done.returncode == 0, done.stderr
    assert pl.read_parquet(work / "two.parquet").equals(expected)


def test_a_full_disk_is_an_error_and_leaves_no_half_table(work: Path, model: config.Model) -> None:
    """A limit of 1,000 bytes per file stands in for the full disk."""
    assert "File too large" in on_a_full_disk(command(sample_responses, options(work, model)), 1000)
    assert not (work / "out.parquet").exists()
    assert not list((work / ".work").rglob("part-*.parquet"))


def test_bad_prompts(work: Path, model: config.Model) -> None:
    file = work / "prompts.parquet"
    for rows, message in (
        (table(INSTRUCTIONS).drop("source"), r"prompts\.parquet lacks columns: source"),
        (table(INSTRUCTIONS).cast({"input": pl.Categorical}), r"lacks columns: input \(String, found Categorical"),
        (pl.concat([table(INSTRUCTIONS)] * 2), r"prompts\.parquet has 2 rows of prompt_id id00"),
    ):
        rows.write_parquet(file)
        with pytest.raises(UserError, match=message):
            run(work, model)
    table(INSTRUCTIONS).write_parquet(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"prompts\.parquet cannot be read: parquet"):
        run(work, model)
    assert not (work / "out.parquet").exists()


def test_more_tokens_than_the_model_reads(work: Path, model: config.Model) -> None:
    with pytest.raises(UserError, match=r"preamble \+ sampling\.max_length is 41\d\d, but the model reads 4096"):
        run(work, model, max_length=4096)


def test_no_text_of_the_data_in_the_log(work: Path, model: config.Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"), patch.object(script.progress, "__kwdefaults__", {"done": 0, "every": 0.0}):
        found = run(work, model)
    assert "batches of 4 prompts" in caplog.text
    for text in [*found["instruction"], *found["response"]]:
        assert len(text) < 5 or text not in caplog.text
