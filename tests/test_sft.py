"""The initial policy: its examples, texts and loss; training, ranks and resuming; and what it learns."""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml

import clean_sft_data
import train_sft
from salmon import checkpoints, encoding, models, prompts, sft, training
from salmon.config import Model, PolicyPrompt, SftData
from salmon.configuration import load
from salmon.errors import UserError
from salmon.formats import EXAMPLE_FORMATS
from salmon.generation import StopStrings
from salmon.plan import Plan
from salmon.sampling import TransformersSampler
from salmon.tables import SFT_EXAMPLES
from salmon.tokenizers import load_tokenizer
from tests import synthetic
from tests.running import ROOT, command, launch
from tests.small_models import CHATML, CHATML_TOKENS, byte_tokenizer, save_markov, spaced_tokenizer
from tests.small_run import DATA, snakemake

PREAMBLE = "A conversation.\n\n### User"
STOP = "\n### User\n"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def collect(tmp_path: Path, format_name: str, rows: list[Any], **more: Any) -> tuple[list[tuple[Any, ...]], Any]:
    """Instruction, input, output and is_whole of the examples in rows, and the counts."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"format": format_name, "path": str(file), **more}
    table, counts = prompts.collect_examples(SftData.model_validate({"sources": {"mine": source}}))
    return table.select("instruction", "input", "output", "is_whole").rows(), counts


# --- examples


def message(name: str, parent: str | None, text: str, rank: int | None = None, **more: Any) -> dict[str, Any]:
    return {"message_id": name, "parent_id": parent, "text": text, "rank": rank, **more}


def turn(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


ROWS: dict[str, tuple[list[Any], list[tuple[Any, ...]], dict[str, int]]] = {
    "instructions": (
        [
            {"instruction": " Add. ", "input": "1, 2", "output": "3\n"},
            {"instruction": "Say it.", "output": "It."},
            {"instruction": "Say it.", "input": "", "output": "That."},  # a prompt may have several answers
            {"instruction": "Say it.", "input": None, "output": "It."},
            {"instruction": "Say it.", "output": " "},
            {"instruction": None, "output": "So."},
        ],
        [("Add.", "1, 2", "3", True), ("Say it.", "", "It.", True), ("Say it.", "", "That.", True)],
        {"rows": 6, "kept": 3, "duplicate": 1, "no answer": 1, "empty": 1},
    ),
    "self_align": (
        [
            {"example_id": 1, "instruction": "Why?", "input": "", "output": "Because.\n\n### User\n"},
            {"example_id": 2, "instruction": "Why?", "input": "", "output": "Because of the"},
        ],
        [("Why?", "", "Because.", True), ("Why?", "", "Because of the", False)],
        {"rows": 2, "kept": 2},
    ),
    "sharegpt": (
        [
            {
                "conversations": [
                    turn("human", "Why? 1 / 2"),
                    turn("gpt", "So."),
                    turn("human", "And?"),
                    turn("gpt", "No."),
                ]
            },
            {"conversations": [turn("user", "How?"), turn("system", "Hm."), turn("gpt", "So.")]},
            {"conversations": [turn("gpt", "Hello."), turn("human", "Hi.")]},
            {"conversations": [turn("system", "Be kind."), turn("human", "Hi."), turn("gpt", "Hello.")]},
            {"conversations": [turn("human", "Who?")]},
            {"conversations": [turn("human", "Who?"), {"from": "gpt", "value": None}]},
        ],
        [("Why?", "", "So.", True)],
        {
            **{"rows": 6, "kept": 1, "no assistant turn second": 1, "no human turn first": 1},
            **{"a system turn first": 1, "fewer than two turns": 1},
        },
    ),
    "dolly": (
        [
            {"instruction": "Sum up.", "context": "A text.", "response": "Text.", "category": "summarization"},
            {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"},
        ],
        [("Sum up.", "A text.", "Text.", True), ("Why?", "", "So.", True)],
        {"rows": 2, "kept": 2},
    ),
    "oasst1": (
        [
            message("a1", "a", "second", 1),
            message("a0", "a", "best", 0),
            message("a", None, "first root"),
            message("a00", "a0", "and then?", 0),
            message("b", None, "second root"),
            message("b0", "b", "deleted", 0, deleted=True),
            message("b1", "b", "spam", 0, review_result=False),
            message("b2", "b", "not ranked"),
            message("c", None, "third root"),
        ],
        [("first root", "", "best", True)],
        {"rows": 9, "kept": 1, "no reply of rank 0": 1, "root without a reply": 1, "deleted": 1, "spam": 1},
    ),
}


@pytest.mark.parametrize("name", EXAMPLE_FORMATS)
def test_a_format_gives_instructions_with_answers(tmp_path, name):
    rows, wanted, numbers = ROWS[name]
    found, counts = collect(tmp_path, name, rows)
    assert found == wanted
    assert {what: counts[f"mine: {what}"] for what in numbers} == numbers
    assert counts["mine: rows"] == sum(counts.values()) - counts["mine: rows"]
    again, _ = collect(tmp_path, name, rows[::-1], limit=1)  # whatever the order of the rows
    assert again == collect(tmp_path, name, rows, limit=1)[0]


@pytest.mark.parametrize("name", EXAMPLE_FORMATS)
def test_bad_rows_are_refused_and_counted(tmp_path, name):
    """Without the answer's column, and with a number in its place."""
    rows, wanted, _ = ROWS[name]
    answer = {"dolly": "response", "oasst1": "text", "sharegpt": "conversations"}.get(name, "output")
    bad = [{key: value for key, value in rows[-1].items() if key != answer}, rows[-1] | {answer: 7}]
    with pytest.raises(UserError, match=rf"column {answer} is missing(.*\n)*.*2 bad rows"):
        collect(tmp_path, name, [*rows, *bad])
    found, counts = collect(tmp_path, name, [*rows, *bad], max_bad_rows=2)
    assert (found, counts["mine: bad rows"]) == (wanted, 2)


def test_no_example_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no example is left from any source .*no answer 1"):
        collect(tmp_path, "instructions", [{"instruction": "Why?", "output": ""}])


# --- text


def policy_prompt(folder: Path, **more: Any) -> PolicyPrompt:
    file = folder / "policy.txt"
    file.write_text(PREAMBLE + "\n")
    return PolicyPrompt.model_validate({"template": str(file), **more})


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(Model(base=str(tiny_model), quantization="none", dtype="float32"))


def encode(tokenizer: Any, prompt: PolicyPrompt, *texts: sft.Text, length: int = 400) -> list[Any]:
    return sft.encode(tokenizer, texts, prompt, length)


def spoken(tokenizer: Any, example: sft.Example) -> str:
    """What the policy says, with special tokens written out."""
    return tokenizer.decode(example.tokens[example.prompt :], skip_special_tokens=False)


def test_what_is_trained_is_the_prompt_of_sampling_and_then_the_answer_with_its_end(tokenizer, tmp_path):
    prompt = policy_prompt(tmp_path)
    [example] = encode(tokenizer, prompt, ("Which planets?", "Saturn, of course.", True))
    query = encoding.encode_prompt(tokenizer, "Which planets?", prompt, PREAMBLE)
    assert example.tokens[: example.prompt].tolist() == query
    whole = f"{PREAMBLE}\nWhich planets?\n\n### Dromedary\nSaturn, of course.\n\n### User\n"
    assert example.tokens.tolist() == tokenizer(whole)["input_ids"]
    assert tokenizer.decode(example.tokens[-example.end :]) == "\n\n### User\n"
    labels = sft.collate([example])["labels"][0]
    assert (labels[: example.prompt] == sft.IGNORED).all()
    assert labels[example.prompt :].tolist() == example.tokens[example.prompt :].tolist()
    # In sampling it ends at its last token, and not before
    stops, said = StopStrings(tokenizer, prompt.stop), example.tokens[example.prompt :].tolist()
    assert [stops.complete("", said[:count]) for count in range(1, len(said) + 1)].index(True) == len(said) - 1


@pytest.mark.parametrize(
    ("stop", "end"),
    [([STOP], "\n" + STOP), (["\n\nUser:", STOP], "\n\nUser:"), (["User:"], "User:"), ([], "</s>")],
)
def test_an_answer_ends_with_the_marker_or_without_one_with_the_end_token(tokenizer, tmp_path, stop, end):
    prompt = policy_prompt(tmp_path, stop=stop)
    [example] = encode(tokenizer, prompt, ("Why?", "So.", True))
    assert spoken(tokenizer, example) == f"So.{end}"
    assert example.tokens[-1] == tokenizer.eos_token_id or stop
    sft.check_end(tokenizer, prompt, end, {tokenizer.eos_token_id})


def test_llamas_kind_of_tokenizer_goes_on_after_the_line_break(tmp_path):
    """A separate text would begin with a space."""
    tokenizer, prompt = spaced_tokenizer(), policy_prompt(tmp_path, stop=[])
    [example] = encode(tokenizer, prompt, ("a", "bad </s> head", True))
    assert (
        example.tokens.tolist()[:-1]
        == tokenizer(f"{PREAMBLE}\na\n\n### Dromedary\nbad </s> head")["input_ids"][:0]
        + (
            encoding.tokenize(
                tokenizer, [f"{PREAMBLE}\na\n\n### Dromedary\n{encoding.guard(tokenizer, 'bad </s> head')}"]
            )[0]
        )
    )
    assert example.tokens.tolist().count(tokenizer.eos_token_id) == 1  # the end's; the answer only spells it out
    assert example.tokens[-1] == tokenizer.eos_token_id


def test_answers_that_are_cut_off_or_too_long_have_no_end(tokenizer, tmp_path):
    prompt = policy_prompt(tmp_path)
    whole, part = encode(tokenizer, prompt, ("Why?", "So it is.", True), ("Why?", "So it is.", False))
    assert part.tokens.tolist() == whole.tokens[: -whole.end].tolist()
    assert (part.end, part.is_cut) == (0, False)
    for length in range(whole.prompt, len(whole.tokens) + 1):
        [example] = encode(tokenizer, prompt, ("Why?", "So it is.", True), length=length)
        if length == whole.prompt:
            assert example is None
        else:
            assert example.tokens.tolist() == whole.tokens[:length].tolist()
            assert (example.end, example.is_cut) == ((0, True) if length < len(whole.tokens) else (whole.end, False))


def test_an_answer_is_read_up_to_a_marker_in_it(tokenizer, tmp_path):
    texts = [("Why?", f"So.\n{STOP}And?", is_whole) for is_whole in (True, False)]
    found = encode(tokenizer, policy_prompt(tmp_path), *texts, ("Why?", f"{STOP}And?", True))
    assert [example and spoken(tokenizer, example) for example in found] == [f"So.\n{STOP}", f"So.\n{STOP}", None]


TEMPLATES = {
    "<|im_end|>": CHATML,
    " </s>": (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("end", TEMPLATES)
def test_a_chat_template_says_how_an_answer_ends(end):
    """It also says how the answer begins, if the template has no beginning of the assistant's turn."""
    tokenizer = byte_tokenizer(special=CHATML_TOKENS, template=TEMPLATES[end])
    prompt = PolicyPrompt(template="chat", stop=[])
    [example] = encode(tokenizer, prompt, ("Why?", "So <|im_end|> it is.", True))
    before = " " if "INST" in TEMPLATES[end] else ""
    assert spoken(tokenizer, example) == f"{before}So <|im_end|> it is.{end}"
    control = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert example.tokens[example.prompt :].tolist().count(control) == (end == "<|im_end|>")
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    [plain] = encode(tokenizer, prompt, ("Why?", "So.", True))
    assert tokenizer.apply_chat_template(turns, tokenize=False).startswith(tokenizer.decode(plain.tokens))
    sft.check_end(tokenizer, prompt, end, {int(plain.tokens[-1])})


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "has no end after an assistant's answer"),
        (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), "begins every answer with thinking"),
    ],
)
def test_a_chat_template_without_an_end_or_with_thinking_is_refused(template, said):
    tokenizer = byte_tokenizer(special=CHATML_TOKENS, template=template)
    with pytest.raises(UserError, match=said):
        sft.frame(tokenizer, PolicyPrompt(template="chat", stop=[]))


# --- training


def make_examples(number: int) -> pl.DataFrame:
    """Made-up examples, two per prompt, with answers of very different lengths."""
    rows = [
        {
            "example_id": f"{index:04}",
            "prompt_id": f"prompt {index // 2}",
            "source": "made up",
            "instruction": "Please explain it",
            "input": "in one, two or three sentences." if index % 3 else "",
            "output": " ".join(["creative"] * (1 + 7 * (index % 5))),
            "is_whole": index % 4 > 0,
        }
        for index in range(number)
    ]
    return pl.DataFrame(rows, schema=SFT_EXAMPLES.schema)


def make_arguments(examples: Path, output: Path, model: Path, prompt: PolicyPrompt, **more: Any) -> dict[str, Any]:
    settings = {"learning_rate": 3e-3, "batch_size": 8, "max_length": 100, "eval_examples": 20, "save_steps": 3}
    return {
        "examples": str(examples),
        "output": str(output),
        "model": {"base": str(model), "quantization": "none", "dtype": "float32", "adapter": "not/read/here"},
        "lora": {"r": 8, "alpha": 16},
        "policy_prompt": prompt.model_dump(),
        "tokens_per_pass": 250,
        "sft": {"max_grad_norm": 1.0, **settings, **more.pop("sft", {})},
        **more,
    }


def run_here(arguments: dict[str, Any]) -> dict[str, Any]:
    train_sft.main(train_sft.Arguments(**arguments))
    return json.loads((Path(arguments["output"]) / "metrics.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> dict[str, Any]:
    """One undisturbed run on one process: 7 steps of 8 examples, each in several passes."""
    folder = tmp_path_factory.mktemp("sft")
    make_examples(80).write_parquet(folder / "examples.parquet")
    prompt = policy_prompt(folder)
    arguments = make_arguments(folder / "examples.parquet", folder / "sft", tiny_model, prompt)
    return {"arguments": arguments, "folder": folder / "sft", "metrics": run_here(arguments)}


def reference(arguments: train_sft.Arguments, rows: list[sft.Example], model: Any) -> tuple[torch.Tensor, int]:
    """Sum of -log p of what is said in these rows, and the number of its tokens: float64, one row at a time."""
    total, number = torch.zeros((), dtype=torch.float64), 0
    for tokens, prompt, *_ in rows:
        logits = model(torch.tensor([tokens.tolist()])).logits[0]
        for place in range(prompt, len(tokens)):
            total = total - torch.log_softmax(logits[place - 1], dim=-1)[int(tokens[place])]
            number += 1
    return total, number


@pytest.fixture(scope="module")
def first_batch(trained) -> dict[str, Any]:
    """The rows of the first step and those held out, with a float64 model as it is before the first step."""
    arguments = train_sft.Arguments(**trained["arguments"])
    base = arguments.model.without_adapter()
    rows, examples, _ = train_sft.read_examples(arguments, load_tokenizer(base))
    parts = training.split(rows, arguments.sft.eval_examples, arguments.sft.seed, sft.NAME)
    train, held = ([examples[place] for place in part["place"]] for part in parts)
    settings = arguments.sft
    order = training.training_order(len(train), settings.batch_size, settings.epochs, settings.seed, sft.NAME)
    model = models.new_policy(base, arguments.lora, "cpu", settings.seed).double()
    return {"arguments": arguments, "first": [train[index] for index in order[:8]], "held": held, "model": model}


def test_the_first_step_is_the_mean_over_all_tokens_of_its_answers(trained, first_batch):
    """Not the mean of the means of passes, whose answers are of different lengths."""
    first, model = first_batch["first"], first_batch["model"]
    total, number = reference(first_batch["arguments"], first, model)
    (total / number).backward()
    squares = [p.grad.square().sum() for p in model.parameters() if p.requires_grad]
    logged = trained["metrics"]["training"][0]
    assert logged["loss"] == pytest.approx((total / number).item(), rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-4)
    with torch.no_grad():
        parts = [reference(first_batch["arguments"], first[at : at + 2], model) for at in range(0, 8, 2)]
    of_means = sum((loss / count).item() for loss, count in parts) / 4
    assert abs(of_means - (total / number).item()) > 1e-2  # else the test would not tell the two apart


def test_held_out_losses_against_the_reference(trained, first_batch):
    held, found = first_batch["held"], trained["metrics"]["evaluation"]
    arguments, model = first_batch["arguments"], first_batch["model"]
    with torch.no_grad():
        total, number = reference(arguments, held, model)
        ended = [example._replace(prompt=len(example.tokens) - example.end) for example in held if example.end]
        end_total, end_number = reference(arguments, ended, model)
    assert (found["number"], found["answer_tokens"]) == (len(held), number)
    assert found["base_model"]["loss"] == pytest.approx((total / number).item(), rel=1e-5)
    assert found["base_model"]["end_loss"] == pytest.approx((end_total / end_number).item(), rel=1e-5)
    assert found["loss"] < found["base_model"]["loss"]
    assert found["end_loss"] < found["base_model"]["end_loss"]


def test_manifest_and_folder(trained, tiny_model):
    """An ordinary adapter, which the stages load as the initial policy."""
    assert {path.name for path in trained["folder"].iterdir()} == {
        *("adapter_model.safetensors", "adapter_config.json", "README.md", "manifest.json", "metrics.json")
    }
    manifest = json.loads((trained["folder"] / "manifest.json").read_text())
    counts = manifest["counts"]
    assert counts["examples"] == 80
    assert counts["examples"] == counts["held_out"] + counts["trained_on"] + counts["left_out_of_last_batch"]
    assert counts["trained_on"] == 8 * counts["steps"]
    assert counts["without_an_end"] == 20
    assert counts["answers_cut"] > 0
    assert counts["answer_tokens"] > 0
    assert manifest["settings"]["model"]["adapter"] is None
    assert set(manifest["inputs"]) >= {trained["arguments"]["examples"], str(tiny_model)}
    model = Model(base=str(tiny_model), adapter=str(trained["folder"]), quantization="none", dtype="float32")
    assert models.load_initial_policy(model, "cpu").peft_config["default"].task_type == "CAUSAL_LM"


@pytest.mark.ranks
@pytest.mark.parametrize("deepspeed", [None, "zero2.json", "zero3.json"])
def test_two_ranks_give_the_result_of_one(trained, tmp_path, deepspeed):
    """The passes of two ranks have different numbers of tokens."""
    arguments = trained["arguments"] | {"output": str(tmp_path / "sft"), "tokens_per_pass": 1}
    run_here(arguments | {"output": str(tmp_path / "one")})  # how far rounding alone moves the result
    if deepspeed:
        arguments["deepspeed"] = str(ROOT / "profiles" / "deepspeed" / deepspeed)
    done = launch(2, *command(train_sft, arguments)[1:])
    assert done.returncode == 0, done.stderr[-3000:]
    wanted, other, two = (weights(folder) for folder in (trained["folder"], tmp_path / "one", tmp_path / "sft"))
    rounding = max((other[name] - wanted[name]).abs().max().item() for name in wanted)
    assert wanted.keys() == two.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=10 * max(rounding, 1e-6))
    metrics = json.loads((tmp_path / "sft" / "metrics.json").read_text())
    for expected, found in zip(trained["metrics"]["training"], metrics["training"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    assert metrics["evaluation"]["loss"] == pytest.approx(trained["metrics"]["evaluation"]["loss"], rel=1e-4)


def test_interrupted_and_resumed_gives_the_bytes_of_an_undisturbed_run(trained, tmp_path, monkeypatch, caplog):
    """`tests/test_pipeline.py` kills it at any moment; what stops a trainer is tested with the reward model's."""
    arguments = trained["arguments"] | {"output": str(tmp_path / "sft")}
    mark = training.Reporter.on_save

    def fail(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt
        mark(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(training.Reporter, "on_save", fail)
        with pytest.raises(KeyboardInterrupt):
            run_here(arguments)
    shutil.copytree(tmp_path / ".work" / "sft", tmp_path / "other" / ".work" / "sft")  # without the lease
    caplog.set_level("INFO")
    metrics = run_here(arguments)
    assert "resuming after step 3" in caplog.text
    name = "adapter_model.safetensors"
    assert (tmp_path / "sft" / name).read_bytes() == (trained["folder"] / name).read_bytes()
    assert metrics == trained["metrics"]
    caplog.clear()
    changed = arguments | {"output": str(tmp_path / "other" / "sft"), "sft": arguments["sft"] | {"learning_rate": 1e-3}}
    run_here(changed)
    assert "belongs to other settings or inputs" in caplog.text


def test_nf4_trains(trained, tmp_path):
    arguments = trained["arguments"] | {"output": str(tmp_path / "sft")}
    arguments["model"] = arguments["model"] | {"quantization": "nf4", "dtype": "bfloat16"}
    arguments["sft"] = arguments["sft"] | {"epochs": 0.4, "eval_examples": 0}
    metrics = run_here(arguments)
    assert all(entry["grad_norm"] > 0 for entry in metrics["training"])
    assert metrics["evaluation"]["number"] == 0
    assert metrics["evaluation"]["loss"] is None


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (lambda table: table.head(23), {}, "23 usable records, too few to hold out 20 .*sft.eval_examples"),
        (lambda table: table.drop("is_whole"), {}, "lacks columns: is_whole"),
        (
            lambda table: table,
            {"max_length": 10, "eval_examples": 0},
            "0 usable records.* 80 examples leave no room for an answer in sft.max_length 10: raise it$",
        ),
        (
            lambda table: table.with_columns(output=pl.lit(f"{STOP}So.")),
            {},
            "0 usable records.*; 80 examples have no answer before a string of policy_prompt.stop$",
        ),
        (lambda table: table, {"max_length": 5000}, "sft.max_length is 5000"),
    ],
)
def test_bad_input_says_what_is_wrong_and_leaves_nothing(trained, tmp_path, change, settings, said):
    change(make_examples(80)).write_parquet(tmp_path / "examples.parquet")
    arguments = trained["arguments"] | {"examples": str(tmp_path / "examples.parquet"), "output": str(tmp_path / "sft")}
    with pytest.raises(UserError, match=said):
        run_here(arguments | {"sft": arguments["sft"] | settings})
    assert not (tmp_path / "sft").exists()
    assert checkpoints.newest(training.WorkFolder(tmp_path / "sft")) is None


def test_an_end_that_ends_nothing_is_an_error(tmp_path):
    """The template's end of a turn is not an end token of the model: it would be learnt, but no answer would end."""
    tokenizer = byte_tokenizer(special=CHATML_TOKENS, template=CHATML)
    base = save_markov(tmp_path / "base", tokenizer, "ab")
    make_examples(40).write_parquet(tmp_path / "examples.parquet")
    prompt = PolicyPrompt(template="chat", stop=[])
    arguments = make_arguments(tmp_path / "examples.parquet", tmp_path / "sft", base, prompt)
    with pytest.raises(UserError, match=r"ends with '<\|im_end\|>', which is neither an end token"):
        run_here(arguments)


# --- what is learnt, on real samples


def share_ended(model: Model, prompt: PolicyPrompt, instructions: list[str]) -> tuple[float, float]:
    """Shares of sampled answers that end by themselves, and that end with the marker."""
    tokenizer, policy = load_tokenizer(model), models.load_initial_policy(model, "cpu")
    sampler = TransformersSampler(tokenizer, "cpu", batch_size=len(instructions), model=policy)
    preamble = encoding.read_preamble(prompt)
    queries = [encoding.encode_prompt(tokenizer, instruction, prompt, preamble) for instruction in instructions]
    found = sampler.sample(
        queries, range(len(queries)), max_new_tokens=[120] * len(queries), temperature=0.7, stop=prompt.stop
    )
    reasons = [generation.finish_reason for generation in found]
    return 1 - reasons.count("length") / len(reasons), reasons.count("stop") / len(reasons)


def test_learns_from_real_samples_what_answers_are_like_and_how_they_end(tiny_model, tmp_path, capsys):
    """A model with random weights, and short answers of Dolly and OASST1; the prompts that it answers are held out."""
    sources = {
        "dolly": {"format": "dolly", "path": str(DATA / "databricks-dolly-15k")},
        "oasst1": {"format": "oasst1", "path": str(DATA / "oasst1")},
    }
    clean_sft_data.main(clean_sft_data.Arguments(output=tmp_path / "all.parquet", sft_data={"sources": sources}))
    table = pl.read_parquet(tmp_path / "all.parquet")
    assert table.group_by("source").len().sort("source").rows() == [("dolly", 700), ("oasst1", 105)]
    lengths = {name: pl.col(name).str.len_chars() for name in ("instruction", "input", "output")}
    short = table.filter(lengths["instruction"] < 100, lengths["input"] == 0, lengths["output"] < 80)
    short[40:].write_parquet(tmp_path / "examples.parquet")
    prompt = policy_prompt(tmp_path)
    settings = {"learning_rate": 1e-2, "epochs": 6, "max_length": 240, "save_steps": 1000}
    arguments = make_arguments(tmp_path / "examples.parquet", tmp_path / "sft", tiny_model, prompt, sft=settings)
    arguments |= {"lora": {"r": 32, "alpha": 64}, "tokens_per_pass": 2048, "gradient_checkpointing": False}
    metrics = run_here(arguments)["evaluation"]
    base = Model(base=str(tiny_model), quantization="none", dtype="float32")
    asked = short["instruction"][:40].to_list()
    before = share_ended(base, prompt, asked)
    after = share_ended(base.model_copy(update={"adapter": str(tmp_path / "sft")}), prompt, asked)
    with capsys.disabled():
        print(
            f"\nSFT: held-out loss {metrics['base_model']['loss']:.2f} -> {metrics['loss']:.2f}, of the ends "
            f"{metrics['base_model']['end_loss']:.2f} -> {metrics['end_loss']:.2f}; answers that end by themselves "
            f"{before[0]:.2f} -> {after[0]:.2f}, with the marker {before[1]:.2f} -> {after[1]:.2f}"
        )
    assert metrics["loss"] < metrics["base_model"]["loss"] - 2
    assert metrics["end_loss"] < metrics["base_model"]["end_loss"] / 2
    assert before[1] == 0
    assert after[1] > 0.4
    assert after[0] > before[0] + 0.3


# --- the workflow


def configuration(folder: Path, **changes: Any) -> Path:
    """The demo's, starting from SFT."""
    (folder / "sharegpt.json").write_text(json.dumps(synthetic.sharegpt()))
    source = {"format": "sharegpt", "path": str(folder / "sharegpt.json")}
    raw = {
        "pathvars": {"results": str(folder / "results")},
        "model": {"adapter": "sft"},
        "sft_data": {"sources": {"self_align": None, "mine": source}},
        "sft": {"max_length": 256},
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    return folder / "config.yaml"


def test_the_workflow_starts_with_sft(tmp_path):
    """Everything that reads the initial policy depends on it; trainings on the base model alone do not."""

    def jobs(*targets: str, **changes: Any) -> str:
        file = configuration(tmp_path, **changes)
        done = snakemake("-n", *targets, "--configfile", "demo/config.yaml", str(file))
        assert done.returncode == 0, done.stdout + done.stderr
        return (done.stdout + done.stderr).rsplit("Job stats:", 1)[1]

    sampled = jobs("response0")
    assert "train_sft" in sampled
    assert "clean_sft_data" in sampled
    assert "train_sft" not in jobs("policy", model={"adapter": None})
    assert "train_sft" not in jobs("pmp", "rl_prompts")  # these need neither its weights nor its tokenizer: it has none
    alone = jobs("sft", model={"adapter": None})
    assert all(rule in alone for rule in ("clean_sft_data", "train_sft", "check_model"))
    assert "sample_responses" not in alone


def test_sft_stands_for_the_adapter_that_is_made(tmp_path):
    """A run that trains a different one has its own."""
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    raw |= {"model": raw["model"] | {"adapter": "sft"}, "pathvars": {"results": "other/"}}
    runs = {"default": {}, "longer": {"sft": {"epochs": 2.0}}, "same": {"ppo": {"clip": 0.1}}, "base": {}}
    runs["base"] = {"model": {"adapter": None}}
    plan = Plan(load(raw | {"runs": runs}, ROOT))
    assert {run: config.model.adapter for run, config in plan.runs.items()} == {
        "default": "other/models/sft",
        "longer": "other/runs/longer/models/sft",
        "same": "other/models/sft",
        "base": None,
    }
    assert "other/models/sft" in {one.name for one in plan.origin("default", "response0").inputs}  # for `verify`
    assert {plan.tokenizer(run) for run in plan.runs} == {plan.tokenizer("base")}
    with pytest.raises(UserError, match=r"sft.max_length: 1024 tokens, but .*demo/model reads at most 512"):
        load(raw | {"model": raw["model"] | {"base": str(ROOT / "demo" / "model")}}, ROOT)
