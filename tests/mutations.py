"""Possible faults in an input: mutations of files and options, which break the input or leave its meaning unchanged.

A mutation never makes another valid input: somebody may want a changed word in a template, one prompt fewer in a source
without a manifest, or other weights of the same shape, and no script can tell. So bytes are flipped in the footer of a
table and in the header of weights, not in their contents.
"""

import gzip
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file, save_file

Change = Callable[[Path, random.Random], None]
DEEP = 100_000
HUGE = [1e300, 10**30, float("inf"), float("nan"), -1e300]


def replace(path: Path, content: bytes | str) -> None:
    """New content; the file may be one of several links to the old one."""
    path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def dumps(value: Any) -> str:
    """JSON, with infinity as a valid number."""
    return json.dumps(value, ensure_ascii=False).replace("Infinity", "1e400")


# ---- Any file


def cut(path: Path, rng: random.Random) -> None:
    whole = path.read_bytes()
    replace(path, whole[: rng.randrange(1, len(whole) - 4)])


def cut_last_line(path: Path, rng: random.Random) -> None:
    whole = path.read_bytes()
    start = whole.rstrip().rfind(b"\n") + 1
    replace(path, whole[: rng.randrange(start + 1, len(whole.rstrip()) - 1)])


def empty(path: Path, rng: random.Random) -> None:
    replace(path, "")


def missing(path: Path, rng: random.Random) -> None:
    path.unlink()


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "a").write_text("a")


def noise(path: Path, rng: random.Random) -> None:
    replace(path, rng.randbytes(300))


def utf16(path: Path, rng: random.Random) -> None:
    replace(path, path.read_text(encoding="utf-8").encode("utf-16"))


def latin1(path: Path, rng: random.Random) -> None:
    replace(path, "ä".encode("latin-1") + path.read_bytes())


def high_bit(path: Path, rng: random.Random) -> None:
    """A byte that UTF-8 never uses."""
    whole = bytearray(path.read_bytes())
    whole[rng.randrange(len(whole))] = 0xFF
    replace(path, bytes(whole))


def unreadable(path: Path, rng: random.Random) -> None:
    """A link to nowhere."""
    path.unlink()
    path.symlink_to("nowhere")


ANY = (empty, missing, folder, noise, unreadable)
TEXT = (missing, folder, utf16, latin1, high_bit, unreadable)

# ---- JSON


def json_change(change: Callable[[Any, random.Random], Any]) -> Change:
    def apply(path: Path, rng: random.Random) -> None:
        replace(path, dumps(change(json.loads(path.read_text(encoding="utf-8")), rng)))

    apply.__name__ = change.__name__
    return apply


def deep(path: Path, rng: random.Random) -> None:
    replace(path, rng.choice(["[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP]))


def long_number(path: Path, rng: random.Random) -> None:
    replace(path, f"[{'9' * 10_000}]")


def other_shape(value: Any, rng: random.Random) -> Any:
    return rng.choice([[value], {"a": value}, 5, "a", None, [], [5], [[]], {"counts": 5}, True])


def no_object(value: Any, rng: random.Random) -> Any:
    return rng.choice([[value], 5, "a", None, []])


JSON = (*ANY, cut, utf16, latin1, high_bit, deep, long_number, json_change(other_shape))


def extra_key(value: Any, rng: random.Random) -> Any:
    """A change that nothing reads."""
    if isinstance(value, dict):
        return value | {"unheard_of": [1, {"a": None}]}
    return [item | {"unheard_of": 1} for item in value]


def no_key(value: list[dict[str, Any]], rng: random.Random) -> Any:
    del value[rng.randrange(len(value))][rng.choice(["dimension", "definition"])]
    return value


def twice(value: list[Any], rng: random.Random) -> Any:
    return [*value, rng.choice(value)]


def strange_value(value: list[dict[str, Any]], rng: random.Random) -> Any:
    item = rng.choice(value)
    item[rng.choice(sorted(item))] = rng.choice([None, [], {}, True, "", *HUGE, "\ud800"])
    return value


def strange_weight(value: list[dict[str, Any]], rng: random.Random) -> Any:
    rng.choice(value)["weight"] = rng.choice([-1, "2", None, True, 1e-300, *HUGE])
    return value


PRINCIPLES = (*JSON, *map(json_change, (extra_key, no_key, twice, strange_value)))
WEIGHTED = (*PRINCIPLES, json_change(strange_weight))

# ---- Manifests


def strange_count(value: dict[str, Any], rng: random.Random) -> Any:
    name = rng.choice([name for name in value["counts"] if name in ("rows", "records", "judged") or "kept" in name])
    value["counts"][name] = rng.choice([-1, 10**30, float("inf"), float("nan"), "5", None, [5], 2.5, True])
    return value


def other_count(value: dict[str, Any], rng: random.Random) -> Any:
    name = next(name for name in ("records", "rows", *value["counts"]) if name in value["counts"])
    name = next((each for each in value["counts"] if each.endswith(": kept")), name)
    value["counts"][name] += rng.choice([-1, 1, 1000])
    return value


def no_counts(value: dict[str, Any], rng: random.Random) -> Any:
    del value[rng.choice(["counts", "settings", "inputs"])]
    return value


def other_manifest(path: Path, rng: random.Random) -> None:
    """A manifest of another kind of table."""
    root = next(parent for parent in path.parents if (parent / "own.jsonl").exists())
    here = kind(path)
    others = [each for each in sorted(root.rglob("*.manifest.json")) if kind(each) != here]
    replace(path, rng.choice(others).read_bytes())


def kind(path: Path) -> frozenset[str]:
    """What a manifest counts, as far as it shows the kind of table."""
    counts = json.loads(path.read_text())["counts"]
    return frozenset("kept" if "kept" in name else name for name in counts if name in KINDS or "kept" in name)


KINDS = ("rows", "judged", "records")
BESIDE = (empty, folder, noise, cut, utf16, high_bit, deep, long_number, json_change(other_shape), other_manifest)
MANIFEST = (*BESIDE, unreadable, missing, *map(json_change, (strange_count, other_count, no_counts, extra_key)))

# ---- Tables


def table_change(change: Callable[[pl.DataFrame, random.Random], pl.DataFrame]) -> Change:
    def apply(path: Path, rng: random.Random) -> None:
        rows = change(pl.read_parquet(path), rng)
        path.unlink()
        rows.write_parquet(path)

    apply.__name__ = change.__name__
    return apply


def footer_flip(path: Path, rng: random.Random) -> None:
    whole = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(whole[-8:-4], "little")
    whole[len(whole) - rng.randrange(1, length)] ^= 1 << rng.randrange(8)
    replace(path, bytes(whole))


def csv(path: Path, rng: random.Random) -> None:
    replace(path, "prompt_id,source\n1,2\n")


def other_table(path: Path, rng: random.Random) -> None:
    root = next(parent for parent in path.parents if (parent / "own.jsonl").exists())
    here = pl.read_parquet_schema(path)
    others = [each for each in sorted(root.rglob("*.parquet")) if pl.read_parquet_schema(each) != here]
    replace(path, rng.choice(others).read_bytes())


def drop_column(rows: pl.DataFrame, rng: random.Random) -> pl.DataFrame:
    return rows.drop(rng.choice(rows.columns))


def reorder_columns(rows: pl.DataFrame, rng: random.Random) -> pl.DataFrame:
    return rows.select(rng.sample(rows.columns, len(rows.columns)))


def extra_column(rows: pl.DataFrame, rng: random.Random) -> pl.DataFrame:
    return rows.with_columns(unheard_of=pl.lit(float("nan")))


def swap_columns(rows: pl.DataFrame, rng: random.Random) -> pl.DataFrame:
    one = rng.choice(rows.columns)
    other = rng.choice([name for name in rows.columns if rows.schema[name] != rows.schema[one]] or ["prompt_id"])
    return rows.rename({one: other, other: one}) if one != other else rows.rename({one: "other"})


def cast_column(rows: pl.DataFrame, rng: random.Random) -> pl.DataFrame:
    value = rng.choice(
        [pl.lit("a"), pl.lit(None), pl.lit(1, pl.UInt8), pl.lit(b"a"), pl.lit(["a"]), pl.lit("a", pl.Categorical)]
    )
    name = rng.choice([name for name in rows.columns if rows.schema[name] != pl.String] or rows.columns[1:])
    return rows.with_columns(value.alias(name))


def some_rows_less(rows: pl.DataFrame, rng: random.Random) -> pl.DataFrame:
    return rows.head(rng.randrange(rows.height))


def rows_twice(rows: pl.DataFrame, rng: random.Random) -> pl.DataFrame:
    return pl.concat([rows, rows.sample(1, seed=rng.randrange(99))])


def a_row_for_another(rows: pl.DataFrame, rng: random.Random) -> pl.DataFrame:
    """The same number of rows, one of them twice."""
    return pl.concat([rows[1:], rows[1:].sample(1, seed=rng.randrange(99))])


def null(rows: pl.DataFrame, rng: random.Random) -> pl.DataFrame:
    name = rng.choice(rows.columns)
    place = rng.randrange(rows.height)
    return rows.with_columns(pl.when(pl.int_range(pl.len()) != place).then(name).alias(name))


def strange_number(rows: pl.DataFrame, rng: random.Random) -> pl.DataFrame:
    names = [name for name, kind in rows.schema.items() if kind.is_float()]
    if not names:
        return null(rows, rng)
    name, place = rng.choice(names), rng.randrange(rows.height)
    value = pl.lit(float(rng.choice(HUGE)))
    return rows.with_columns(pl.when(pl.int_range(pl.len()) == place).then(value).otherwise(name).alias(name))


COLUMNS = (drop_column, reorder_columns, extra_column, swap_columns, cast_column)
ROWS = (some_rows_less, rows_twice, a_row_for_another, null, strange_number)
TABLE = (*ANY, cut, footer_flip, footer_flip, csv, other_table, *map(table_change, (*COLUMNS, *ROWS)))

# ---- Models


def header_flip(path: Path, rng: random.Random) -> None:
    whole = bytearray(path.read_bytes())
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    whole[rng.randrange(length)] ^= 1 << rng.randrange(8)
    replace(path, bytes(whole))


def header(path: Path, rng: random.Random) -> None:
    """A header that says something else."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    content = rng.choice(
        [b"{}", b"[]", b'{"a": 5}', b"{" * 5000, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}']
    )
    size = rng.choice([len(content), 2**63, 10**7])
    replace(path, struct.pack("<Q", size) + content + whole[8 + length :])


def weights_change(change: Callable[[dict[str, Any], random.Random], dict[str, Any]]) -> Change:
    def apply(path: Path, rng: random.Random) -> None:
        weights = change(load_file(path), rng)
        path.unlink()
        save_file(weights, path, metadata={"format": "pt"})

    apply.__name__ = change.__name__
    return apply


def a_weight_less(weights: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    del weights[rng.choice(sorted(weights))]
    return weights


def a_weight_more(weights: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return weights | {rng.choice(["base_model.model.x.lora_A.weight", "model.x.weight", "a"]): torch.ones(4, 4)}


def another_shape(weights: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    name = rng.choice(sorted(weights))
    return weights | {name: torch.ones(3, 5)}


def no_numbers(weights: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """NaN in every weight."""
    return {name: torch.full_like(weight, float("nan")) for name, weight in weights.items()}


WEIGHTS = (*ANY, cut, header_flip, header_flip, header)
WEIGHTS += tuple(map(weights_change, (a_weight_less, a_weight_more, another_shape, no_numbers)))


def key_change(**choices: list[Any]) -> Change:
    def some_key(value: dict[str, Any], rng: random.Random) -> Any:
        name = rng.choice(sorted(choices))
        chosen = rng.choice(choices[name])
        if chosen is ...:
            value.pop(name, None)
        else:
            value[name] = chosen
        return value

    return json_change(some_key)


MODEL_CONFIG = (
    *JSON,
    json_change(extra_key),
    *[
        key_change(
            model_type=["nonsense", 5, None, ..., "../x"],
            hidden_size=["x", -1, 0, None, 10**30, 33, float("nan")],
            num_hidden_layers=[10**9, -1, "x", 3, None],
            num_attention_heads=[0, -4, 7, "x", 10**9],
            vocab_size=[0, -1, "x", 10**12, 7],
            rope_parameters=[5, "x", {"rope_type": "nonsense"}, {"rope_type": "dynamic"}],
            hidden_act=["nonsense", 5],
            architectures=["Nonsense", ["Nonsense"], 5],
            auto_map=[{"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}],
            quantization_config=[{"quant_method": "nonsense"}, 5, {"quant_method": "gptq", "bits": 4}],
            max_position_embeddings=["x", -1, 5],
            dtype=["nonsense", 5],
        )
    ]
    * 8,
)
GENERATION_CONFIG = (
    *map(json_change, (extra_key,)),
    empty,
    cut,
    folder,
    high_bit,
    deep,
    json_change(no_object),
)
GENERATION_CONFIG += (key_change(eos_token_id=["x", {}, [[2]], 1.5, -1], temperature=[-1, "x", None]),) * 4
ADAPTER_CONFIG = (
    *JSON,
    json_change(extra_key),
    *[
        key_change(
            peft_type=["NONSENSE", "IA3", "PREFIX_TUNING", 5, None, ...],
            task_type=["NONSENSE", 5],
            r=[0, -1, "x", 3, 10**9, None, 2.5, float("inf")],
            lora_alpha=["x", None, float("nan"), float("inf"), []],
            target_modules=[[], ["nonsense"], 5, "(", None, ["lm_head"]],
            use_dora=[True, "x"],
            lora_dropout=[5, -1, "x"],
            auto_mapping=[{"base_model_class": "os", "parent_library": "os"}],
            rank_pattern=[{"q_proj": 7}, 5, {"(": 2}],
            alpha_pattern=[5, {"q_proj": "x"}],
            base_model_name_or_path=["elsewhere", 5, None],
            layers_to_transform=[[99], "x"],
            modules_to_save=[["nonsense"], 5],
        )
    ]
    * 8,
)
TOKENIZER = (
    *ANY,
    cut,
    utf16,
    high_bit,
    deep,
    json_change(other_shape),
    json_change(extra_key),
    *[
        key_change(
            model=[5, {}, {"type": "BPE", "vocab": {}, "merges": []}, {"type": "Nonsense"}, ...],
            added_tokens=[5, [{"id": -1}], [{"id": 10**30, "content": "a"}], None],
            post_processor=[5, {"type": "Nonsense"}],
            pre_tokenizer=[
                5,
                {"type": "Nonsense"},
                {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"},
            ],
            decoder=[5, {"type": "Nonsense"}],
            version=["9.0", 5],
        )
    ]
    * 5,
)
TOKENIZER_CONFIG = (
    empty,
    cut,
    folder,
    high_bit,
    deep,
    json_change(other_shape),
    json_change(extra_key),
    *[
        key_change(
            tokenizer_class=["Nonsense", 5, "../x"],
            eos_token=[5, "not a token", ["a"], {"a": 1}, None],
            added_tokens_decoder=[5, {"x": 1}, {"0": {"content": 5}}],
            auto_map=[{"AutoTokenizer": ["evil.Tokenizer", None]}],
            model_max_length=["x", 1e400],
        )
    ]
    * 5,
)


def chat_template(text: str) -> Change:
    def other_chat_template(path: Path, rng: random.Random) -> None:
        replace(path, text)

    return other_chat_template


CHAT_TEMPLATE = tuple(
    chat_template(text)
    for text in (
        *(
            "{% for m in",
            "{{ nonsense.a.b }}",
            "{{ messages[5].content }}",
            "{{ raise_exception('no') }}",
            "{{ 1 / 0 }}",
        ),
        *(
            "{% for i in range(10 ** 9) %}{% endfor %}",
            "{{ ''.__class__.__mro__ }}",
            "{% include 'x' %}",
            "{{ messages | nonsense }}",
        ),
        *("{% if %}", "{{ " + "(" * 2000 + ")" * 2000 + " }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
        *(
            "{{ cycler() }}",
            "{% set a = 5 %}{{ a.b.c }}",
            "{{ messages.x.y.z() }}",
            "{{ strftime_now(5) }}",
            "{{ open('x') }}",
        ),
    )
)

# ---- Data sets


def broken_zip(path: Path, rng: random.Random) -> None:
    whole = bytearray(path.read_bytes())
    whole[rng.randrange(10, len(whole))] ^= 1 << rng.randrange(8)
    replace(path, bytes(whole))


def zipped_noise(path: Path, rng: random.Random) -> None:
    replace(path, gzip.compress(rng.randbytes(300)))


def deep_line(path: Path, rng: random.Random) -> None:
    """Deep nesting in a data set's last line."""
    replace(path, path.read_bytes() + b'{"instruction": ' + b"[" * DEEP + b"\n")


def deep_item(path: Path, rng: random.Random) -> None:
    """Deep nesting in a list; ijson's time grows with the square of the depth."""
    replace(path, "[" * (DEEP // 10))


def line_of(*lines: str) -> Change:
    def wrong_line(path: Path, rng: random.Random) -> None:
        replace(path, path.read_bytes() + rng.choice(lines).encode("utf-8", "surrogatepass") + b"\n")

    return wrong_line


LINES = (*ANY, utf16, high_bit, cut_last_line, deep_line)
OWN = (
    *LINES,
    line_of("5", "[]", "{", '{"input": ""}', '{"instruction": 5}', '{"instruction": ["a"]}', "{'instruction': 'a'}"),
    line_of('{"instruction": "a word", "question_type": "nonsense"}', '{"instruction": "a", "question_type": 7}'),
    line_of(
        *(f'{{"instruction": "Tell me more", "length_bonus": {n}}}' for n in ("1e400", "NaN", "-Infinity", "1e300"))
    ),
)
ZIPPED = (*ANY, cut, broken_zip, zipped_noise)
PAIRS = (*ANY, utf16, high_bit, cut, deep_item, json_change(other_shape))
ORCA = (*ANY, cut, footer_flip, csv, table_change(drop_column), table_change(reorder_columns))

# ---- Command lines


def leaves(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places of the values in nested options."""
    if isinstance(value, dict):
        return [place for key, item in value.items() for place in leaves(item, (*at, key))]
    return [at]


def strange_setting(options: dict[str, Any], rng: random.Random) -> None:
    place = rng.choice([each for each in leaves(options) if each[0] != "output" and len(each) > 1] or [("shards",)])
    inner = options
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = rng.choice([*HUGE, {"a": 1}, [[]]])


def unknown_setting(options: dict[str, Any], rng: random.Random) -> None:
    rng.choice([value for value in options.values() if isinstance(value, dict)] or [options])["unheard_of"] = 1


def unknown_option(options: dict[str, Any], rng: random.Random) -> None:
    options["unheard_of"] = "1"


def no_option(options: dict[str, Any], rng: random.Random) -> None:
    del options[
        rng.choice([name for name in options if name not in ("lora", "gradient_checkpointing", "parts", "init")])
    ]


def broken_section(options: dict[str, Any], rng: random.Random) -> None:
    name = rng.choice([name for name, value in options.items() if isinstance(value, dict | list)])
    text = json.dumps(options[name])
    options[name] = rng.choice(
        [
            text[: rng.randrange(1, len(text) - 1)],
            "{",
            "nonsense",
            "5",
            "{" * 1000,
            "[" * DEEP,
            '{"a":' * 20_000,
            "null",
            "{'a': 1}",
        ]
    )


def strange_output(options: dict[str, Any], rng: random.Random) -> None:
    options["output"] = rng.choice(["own.jsonl/out.parquet", "/proc/nowhere/out.parquet", "o" * 300 + ".parquet"])


OPTIONS = (strange_setting,) * 6 + (
    unknown_setting,
    unknown_option,
    no_option,
    broken_section,
    broken_section,
    strange_output,
)
NUMBERS = {  # section -> values that are numbers, but make no sense
    "sampling": {
        "temperature": [-1, 1e-9, 1e9],
        "top_p": [0, 1.5],
        "max_length": [0, 10**9],
        "seeds": [[1, 1], [-1, 2], [1, 10**12]],
    },
    "lora": {"r": [0, 10**6], "alpha": [0, -1, 1e30], "dropout": [1, -0.1, 1.5]},
    "judge": {"max_length": [0, 10**9], "min_characters": [-1], "shards": [0, 10**7]},
    "aggregation": {"passes": [0, 10**9], "geometric_p": [0, 1.1], "label_noise": [-0.1, 2], "seed": [-1, 2**40]},
    "reward_model": {
        **{
            "learning_rate": [0, -1, 1e30],
            "epochs": [0, 1e12],
            "warmup_ratio": [2],
            "max_grad_norm": [0],
            "seed": [-1, 2**32],
        },
        **{"batch_size": [0, 10**9], "eval_examples": [-1, 10**9], "weight_decay": [-1], "save_steps": [0]},
    },
    "ppo": {
        **{
            "temperature": [0, 1e-9],
            "learning_rate": [0, 7],
            "gamma": [1.1],
            "lam": [-1],
            "clip": [0],
            "kl_coefficient": [-1],
        },
        **{
            "stop_penalty": [1],
            "boost": [-1, 1e30],
            "principles_per_rollout": [-1, 50],
            "epochs": [0],
            "seed": [2**33],
        },
        **{
            "response_length": [0, 10**9],
            "minibatch_size": [3],
            "rollout_batch_size": [10**9],
            "length_reward": [1e30],
        },
    },
    "rl_prompts": {"min_tokens": [0, 61], "max_tokens": [10**9], "length_bonus": [{"general": 1.0}], "seed": [-1]},
    "pmp_data": {"min_score_ratio": [0.5, 1e30], "seed": [2**32]},
    "prompts": {"seed": [-1], "sources": [{}]},
}


def number_out_of_range(options: dict[str, Any], rng: random.Random) -> None:
    sections = [name for name in options if name in NUMBERS and isinstance(options[name], dict)]
    if not sections:
        strange_setting(options, rng)
        return
    name = rng.choice(sections)
    key = rng.choice(sorted(NUMBERS[name]))
    options[name] = options[name] | {key: rng.choice(NUMBERS[name][key])}


OPTIONS += (number_out_of_range,) * 8


def erase(path: Path) -> None:
    """Delete what is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
