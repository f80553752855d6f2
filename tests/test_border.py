"""Numbers and files from outside: invalid ones are refused, with the key or file, before anything is computed."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from salmon import border, checked, principles, reward_model, tables
from salmon.aggregation import scaled_scores
from salmon.configuration import load
from salmon.errors import UserError
from salmon.identity import context_limit
from salmon.tables import JUDGEMENTS, PREFERENCE_RECORDS, RL_PROMPTS
from tests import forks
from tests.border_world import BorderWorld
from tests.running import SCRIPTS, on_a_full_disk
from tests.test_config import ROOT, check_lines, set_key

RAW: dict[str, Any] = yaml.safe_load((ROOT / "config.yaml").read_text())
WEIGHT = {"dimension": "a", "definition": "b"}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("lora.dropout", [1, 1.0, -0.1]),
        ("lora.r", [0, 10**6]),
        ("lora.alpha", [0, -1, 1e13]),
        ("sampling.temperature", [-1, 1e-9, 1e9]),
        ("sampling.top_p", [0, 1.1]),
        ("sampling.seeds", [[-1, 2], [1, 2**32]]),
        ("sampling.max_length", [0, 10**9]),
        ("sampling.shards", [0, 10**6]),
        ("judge.min_characters", [-1]),
        ("aggregation.passes", [0, 10**6]),
        ("aggregation.geometric_p", [0, 1.5]),
        ("aggregation.seed", [-1, 2**32]),
        ("pmp_data.min_score_ratio", [0.5, 1e13]),
        ("pmp.learning_rate", [0, 2]),
        ("pmp.epochs", [0, 1e6]),
        ("reward_model.weight_decay", [-1, 1e13]),
        ("reward_model.warmup_ratio", [-0.1, 1.1]),
        ("rl_prompts.length_bonus.general", [1e13, -1e13]),
        ("ppo.temperature", [0, 1e-9]),
        ("ppo.boost", [-1, 1e13]),
        ("ppo.kl_coefficient", [-1]),
        ("ppo.gamma", [1.1]),
        ("ppo.length_reward", [1e13]),
        ("ppo.boosted_words", [{"general": [""]}]),
        ("policy_prompt.template_variables", [{"a": float("nan")}]),
        ("seed", [-1, 10**8]),
    ],
)
def test_numbers_out_of_their_range(key: str, values: list[Any]) -> None:
    raw = set_key(RAW, "policy_prompt.template", "chat") if key.startswith("policy_prompt") else RAW
    for value in values:
        with pytest.raises(UserError) as error:
            load(set_key(raw, key, value), ROOT)
        check_lines(str(error.value), [key])


def numbers(value: Any, at: str = "") -> list[str]:
    """Keys of all numbers."""
    if isinstance(value, dict):
        return [key for name, item in value.items() for key in numbers(item, f"{at}.{name}")]
    return [at[1:]] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1.0e+300", "1" + "0" * 400])
def test_no_number_of_the_configuration_is_infinite_or_none(text: str) -> None:
    found = numbers(RAW)
    assert len(found) > 60
    for key in found:
        with pytest.raises(UserError) as error:
            load(set_key(RAW, key, yaml.safe_load(text)), ROOT)
        assert key in str(error.value)


def test_seeds_that_the_repetition_makes_too_large() -> None:
    raw = set_key(set_key(RAW, "ppo.seed", 2**32 - 5), "seed", 1)
    with pytest.raises(UserError, match=r"valid:\n  ppo\.seed: .*less than 4294967296"):
        load(raw, ROOT)


@pytest.mark.parametrize("weight", ["1e400", "NaN", "-Infinity", "1e300", "1e-300", "-1", "true", '"2"', "null"])
def test_weights_that_no_draw_can_use(tmp_path: Path, weight: str) -> None:
    (tmp_path / "w.json").write_text(json.dumps([WEIGHT | {"weight": "W"}]).replace('"W"', weight))
    with pytest.raises(UserError, match=r"w\.json is not valid:\n  0\.weight: "):
        principles.read_weighted(tmp_path / "w.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"not JSON \(Expecting value in line 1\)"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe[\x00", r"not UTF-8 \(byte 0\)"),
        (b"[" + b"9" * 5000 + b"]", "a number with thousands of digits"),
        (None, "Is a directory"),
    ],
)
def test_files_that_are_no_json(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "p.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=rf"principles .*p\.json cannot be read: {said}; a file of principles is"):
        principles.read_judged(path)


def test_what_passes_the_border_as_it_is() -> None:
    for error in (MemoryError(), UserError("as it is"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as found, border.reading("a file", "mend it"):
            raise error
        assert found.value is error
    out_of_memory = type("OutOfMemoryError", (RuntimeError,), {})
    with pytest.raises(out_of_memory), border.reading("a file", "mend it"):
        raise out_of_memory
    panic = type("PanicException", (BaseException,), {})
    said = "a file cannot be read: index out of range; mend it"
    with pytest.raises(UserError, match=said), border.reading("a file", "mend it"):
        raise panic("index out\n of range.")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e13])
def test_numbers_of_tables(tmp_path: Path, value: float) -> None:
    texts = dict.fromkeys(RL_PROMPTS.columns, "general")
    rows = [texts | {"prompt_id": "a", "length_bonus": 1.0}, texts | {"prompt_id": "b", "length_bonus": value}]
    pl.DataFrame(rows, schema=RL_PROMPTS.schema).write_parquet(tmp_path / "rl.parquet")
    with pytest.raises(UserError, match=r"rl\.parquet has numbers .* in length_bonus, first in the row of prompt_id b"):
        checked.read(tmp_path / "rl.parquet", RL_PROMPTS)


def test_damage_inside_of_a_table_is_found_when_it_is_opened(tmp_path: Path) -> None:
    """The damage is in the column that is read last and not searched for anything."""
    rows = pl.DataFrame(
        {"prompt_id": map(str, range(500)), "dimension": "a", "s12": [n * 0.1 for n in range(500)], "s21": 1.0},
        schema=JUDGEMENTS.schema,
    )
    path = tmp_path / "j.parquet"
    rows.write_parquet(path, compression="zstd")
    whole = bytearray(path.read_bytes())
    start = len(whole) // 2
    whole[start : start + 200] = b"\xff" * 200
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"j\.parquet cannot be read: .*; copy it again, or move it away"):
        tables.check_rows(tables.read(path, JUDGEMENTS), JUDGEMENTS, path)


def test_scores_whose_variance_is_rounded_to_nothing() -> None:
    tiny = pl.Series([1e-200, 2e-200, -1e-200]).to_numpy()
    with pytest.raises(ValueError, match="no variance"):
        scaled_scores(tiny, tiny)


def test_a_models_configuration_may_say_anything() -> None:
    for nonsense in ({"rope_scaling": 5}, {"max_position_embeddings": "x"}, {"rope_parameters": {"a": {"type": 5}}}):
        assert context_limit(nonsense) is None


@pytest.mark.parametrize(
    ("column", "value"),
    [("negated", [True, False]), ("definitions", []), ("deciding", "Brave"), ("dimensions", ["Kind"])],
)
def test_records_that_do_not_agree_with_themselves(tmp_path: Path, column: str, value: Any) -> None:
    row = dict.fromkeys(PREFERENCE_RECORDS.columns, "a") | {"preference": 1, "deciding": "Clear", "negated": [True]}
    row |= {"dimensions": ["Clear"], "definitions": ["Be clear."]}
    for changes in ({}, {column: value}):
        pl.DataFrame([row | changes], schema=PREFERENCE_RECORDS.schema).write_parquet(tmp_path / "r.parquet")
        if changes:
            with pytest.raises(UserError, match="do not match; the first is record a"):
                reward_model.read_records(tmp_path / "r.parquet")
        else:
            assert len(reward_model.read_records(tmp_path / "r.parquet")[0]) == 1


@pytest.mark.parametrize("name", ["clean_pmp_data", "gather responses 0", "aggregate_preferences"])
def test_a_full_disk_is_a_sentence(border_world: BorderWorld, tmp_path: Path, name: str) -> None:
    """A limit of 1,500 bytes per file stands for a full disk."""
    job = border_world.jobs[name]
    border_world.copy(tmp_path / "here", job)
    script = SCRIPTS / f"{job.script}.py"
    options = forks.options(job.options)
    said = on_a_full_disk([sys.executable, script, *options], 1500, cwd=tmp_path / "here")
    # The records' data fit into the limit, their footer does not; polars does not say why it could not write it. In a
    # process of its own, py3langid fails before that.
    footer = name == "aggregate_preferences" and os.environ.get(forks.FOLDER)
    assert ("transport error" if footer else "File too large") in said
    assert "check the path, its permissions, and the free disk space" in said
    assert "Traceback" not in said
    assert not (tmp_path / "here" / job.output).exists()
