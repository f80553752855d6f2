"""No model is used with a weight missing, left over or of another shape: base, adapter or head, whichever loads it."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AdaLoraConfig, LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import check_model
from salmon import checking, models
from salmon.adapters import add_lora, load_adapter
from salmon.config import Judge, Lora, Model, PolicyPrompt, Ppo, Sampling, Scoring
from salmon.configuration import load
from salmon.errors import UserError
from salmon.identity import context_limit
from salmon.shared_base import SharedBase
from salmon.tokenizers import load_tokenizer
from tests import zoo
from tests.small_models import CHATML, CHATML_TOKENS, byte_tokenizer

ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
SCORE = "base_model.model.score.weight"
REWARD = str(ROOT / "demo/templates/reward_model_rl.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    zoo.build("llama", folder)
    return folder


def settings(folder: Path, **more: Any) -> Model:
    return Model(base=str(folder), quantization="none", dtype="float32", **more)


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file, {"format": "pt"})


def without(ending: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {key: value for key, value in weights.items() if not key.endswith(ending)}


def damage(folder: Path, how: str) -> None:
    """Make the files of a model folder others than its configuration says."""
    if how == "no output layer":
        rewrite(folder / WEIGHTS, without("lm_head.weight"))
    elif how == "no layer":
        rewrite(folder / WEIGHTS, lambda w: {key: value for key, value in w.items() if ".layers.1." not in key})
    elif how == "a layer more":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    elif how == "a layer fewer":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    elif how == "another shape":
        rewrite(folder / WEIGHTS, lambda w: w | {"model.norm.weight": torch.ones(7)})
    elif how == "cut off":
        whole = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    elif how == "pickle":
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no output layer", "1 are missing .lm_head.weight"),
        ("no layer", "are missing .*layers.1"),
        ("a layer more", "are missing .*layers.3"),
        ("a layer fewer", "fit nothing in it .*layers.2"),
        ("another shape", "norm.weight|shape|ignore_mismatched"),
        ("cut off", "cannot be read"),
        ("pickle", "safetensors only, since a pickle may run code"),
    ],
)
def test_a_base_model_that_is_not_whole_is_refused(llama: Path, tmp_path: Path, how: str, said: str) -> None:
    shutil.copytree(llama, tmp_path / "m")
    damage(tmp_path / "m", how)
    for attempt in (
        lambda: models.load_initial_policy(settings(tmp_path / "m"), "cpu"),
        lambda: models.new_reward_model(settings(tmp_path / "m"), Lora(r=2), "cpu", 0),
    ):
        with pytest.raises(UserError, match=said):
            attempt()


def test_tied_output_layers_are_not_missing(tmp_path: Path) -> None:
    zoo.build("llama_tied", tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    models.load_base(settings(tmp_path), "cpu")


def test_a_model_in_the_home_folder(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama.parent))
    model = settings(Path("~") / llama.name, adapter="~/a")
    assert (model.base, model.adapter) == (str(llama), str(llama.parent / "a"))
    models.load_base(model, "cpu")


def test_attention_that_a_model_does_not_have_names_the_key(tmp_path: Path) -> None:
    zoo.build("bloom", tmp_path)
    with pytest.raises(UserError, match=r"has no sdpa: set model\.attention to eager"):
        models.load_base(settings(tmp_path), "cpu")


def make_adapter(base: Path, folder: Path, **more: Any) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **more),
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.3)
    model.save_pretrained(str(folder))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(llama, folder)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: {k.replace("q_proj", "q_projection"): v for k, v in w.items()}, "are missing .*fit nothing"),
        (lambda w: {k: v for k, v in w.items() if ".layers.1." not in k}, "are missing"),
        (lambda w: w | {"base_model.model.model.layers.0.x.lora_A.weight": torch.ones(4, 4)}, "fit nothing"),
        (lambda w: {k: v[:2] if "lora_A" in k else v for k, v in w.items()}, "cannot be read"),
        (lambda w: w | {"base_model.model.model.embed_tokens.weight": torch.ones(320, 64)}, "not LoRA .*merge"),
        (lambda w: {}, "no weights"),
    ],
)
def test_an_adapter_is_used_whole_or_not_at_all(
    llama: Path, adapter: Path, tmp_path: Path, change: Any, said: str
) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    rewrite(tmp_path / "a" / ADAPTER, change)
    with pytest.raises(UserError, match=f"(?s){said}"):
        models.load_initial_policy(settings(llama, adapter=str(tmp_path / "a")), "cpu")
    with pytest.raises(UserError, match=f"(?s){said}"):  # as one more adapter, which PEFT does not even warn of
        load_adapter(load_adapter(models.load_base(settings(llama), "cpu"), str(adapter)), str(tmp_path / "a"), "other")


def test_a_prefix_is_mapped(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """The classes of a model with a tower name the same layers in two ways."""
    shutil.copytree(adapter, tmp_path / "a")
    rewrite(
        tmp_path / "a" / ADAPTER,
        lambda w: {k.replace("model.model.layers", "model.model.language_model.layers"): v for k, v in w.items()},
    )
    wanted = logits(models.load_initial_policy(settings(llama, adapter=str(adapter)), "cpu"))
    found = logits(models.load_initial_policy(settings(llama, adapter=str(tmp_path / "a")), "cpu"))
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)
    assert (wanted - logits(models.load_base(settings(llama), "cpu"))).abs().max() > 0.1


def change_json(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "of tomorrow"])
def test_an_adapter_that_changes_the_base_is_refused(llama: Path, adapter: Path, tmp_path: Path, begun: str) -> None:
    """Put on the base a second time, for the reference, it would change all that is on it already."""
    shutil.copytree(adapter, tmp_path / "a")
    change_json(tmp_path / "a" / "adapter_config.json", init_lora_weights=begun)
    with pytest.raises(UserError, match=f"init_lora_weights '{begun}'.*path_initial_model_for_weight_conversion"):
        models.load_initial_policy(settings(llama, adapter=str(tmp_path / "a")), "cpu")


@pytest.mark.parametrize("begun", ["pissa", "olora"])
def test_such_an_adapter_saved_as_plain_lora_is_right_in_rl(llama: Path, tmp_path: Path, begun: str) -> None:
    """As the message says to save it."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=begun),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "begun"))
    model.peft_config["default"].init_lora_weights = begun
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(str(tmp_path / "a"), path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    given = settings(llama, adapter=str(tmp_path / "a"))
    models.new_reward_model(settings(llama), Lora(r=2), "cpu", 0).save_pretrained(str(tmp_path / "rm"))
    shared = SharedBase(given, Lora(r=2), tmp_path / "rm", torch.device("cpu"), seed=0)
    for role in ("policy", "reference"):
        with shared.use(role):
            torch.testing.assert_close(logits(shared), logits(model.eval()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"alpha_pattern": {"model.layers.0.mlp.gate_proj": 64}},
        {"alpha_pattern": {r"^model\.layers\.0\.mlp\.gate_proj": 64}},
        {"rank_pattern": {"model.layers.0.mlp.gate_proj": 2}},
        {"rank_pattern": {"layers.1.mlp.up_proj": 2}, "alpha_pattern": {"up_proj": 8}},
    ],
)
def test_patterns_of_an_adapter_are_mapped_with_its_keys(tmp_path: Path, patterns: dict[str, Any]) -> None:
    """An adapter that was trained on the language model alone, put on it beside its tower."""
    zoo.build("gemma3_vision", tmp_path / "m")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    text = AutoModelForCausalLM.from_config(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.tie_weights()
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "gate_proj", "up_proj"], **patterns)
    model = randomised(get_peft_model(text, config)).eval()
    model.save_pretrained(str(tmp_path / "a"))
    # Also finding its targets in the tower: `q_proj` is there, too.
    found = models.load_initial_policy(settings(tmp_path / "m", adapter=str(tmp_path / "a")), "cpu")
    torch.testing.assert_close(logits(found), logits(model), atol=2e-4, rtol=2e-4)
    assert not [key for key, _ in found.named_parameters() if "vision" in key and "lora" in key]


def randomised(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.3)
    return model


def test_lora_on_embeddings_is_verified_and_trained(llama: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    model = randomised(get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)).eval()
    model.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    given = settings(llama, adapter=str(tmp_path / "a"))
    models.new_reward_model(settings(llama), Lora(r=2), "cpu", 0).save_pretrained(str(tmp_path / "rm"))
    shared = SharedBase(given, Lora(r=2), tmp_path / "rm", torch.device("cpu"), seed=0)
    names = {id(parameter): key for key, parameter in shared.named_parameters()}
    trained = {names[id(parameter)] for parameter in shared.trained()}
    assert {key for key in names.values() if ".embed_tokens.lora_" in key and key.endswith("default")} <= trained
    shared.save_policy(tmp_path / "policy")
    again = models.load_initial_policy(settings(llama, adapter=str(tmp_path / "policy")), "cpu")
    torch.testing.assert_close(logits(again), logits(model))
    for half in "AB":
        shutil.copytree(tmp_path / "a", tmp_path / half)
        rewrite(tmp_path / half / ADAPTER, without(f"lora_embedding_{half}"))
        with pytest.raises(UserError, match="are missing"):
            models.load_initial_policy(settings(llama, adapter=str(tmp_path / half)), "cpu")


@pytest.mark.parametrize(
    ("file", "contents", "said"),
    [
        ("adapter_config.json", "[]", "TypeError"),
        ("adapter_config.json", "{", "cannot be read"),
        ("adapter_config.json", {"r": "8"}, "cannot be read"),
        (ADAPTER, "short", "cannot be read"),
        ("adapter_model.bin", "no pickle", "no weights in safetensors"),
    ],
)
def test_a_damaged_adapter_is_refused_in_a_sentence(
    llama: Path, adapter: Path, tmp_path: Path, file: str, contents: Any, said: str
) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    if isinstance(contents, dict):
        change_json(tmp_path / "a" / file, **contents)
    else:
        (tmp_path / "a" / file).write_text(contents)
    if file.endswith(".bin"):
        (tmp_path / "a" / ADAPTER).unlink()
    with pytest.raises(UserError, match=rf"(?s)adapter .*{said}.*it has to be a PEFT folder"):
        models.load_initial_policy(settings(llama, adapter=str(tmp_path / "a")), "cpu")


@pytest.mark.parametrize(
    ("file", "entries", "said"),
    [
        ("model.safetensors.index.json", {}, "KeyError"),
        ("config.json", {"num_attention_heads": "four"}, "num_attention_heads"),
        ("config.json", {"rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}}, "rope"),
    ],
)
def test_damaged_settings_of_a_base_model_are_refused_in_a_sentence(
    tmp_path: Path, file: str, entries: dict[str, Any], said: str
) -> None:
    zoo.build("phi3_longrope", tmp_path)
    if "index" in file:
        (tmp_path / WEIGHTS).unlink()
        (tmp_path / file).write_text("{}")
    change_json(tmp_path / file, **entries)
    if "rope_scaling" in entries:
        config = json.loads((tmp_path / file).read_text())
        del config["rope_parameters"]
        (tmp_path / file).write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"(?s)cannot be read: .*{said}.*model\.base"):
        models.load_base(settings(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-50], "cannot be read: .*; build the reward model again"),
        (lambda w: w | {SCORE: torch.zeros(2, 64)}, r"shape \(2, 64\)"),
        (lambda w: w | {SCORE: torch.zeros(64)}, r"shape \(64,\)"),
        (lambda w: w | {SCORE: torch.zeros(1, 65)}, "reads 65 numbers, and .* gives 64|size mismatch"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(llama: Path, tmp_path: Path, change: Any, said: str) -> None:
    models.new_reward_model(settings(llama), Lora(r=2), "cpu", 0).save_pretrained(str(tmp_path))
    if said.startswith("cannot be read"):
        (tmp_path / ADAPTER).write_bytes(change((tmp_path / ADAPTER).read_bytes()))
    else:
        rewrite(tmp_path / ADAPTER, change)
    with pytest.raises(UserError, match=f"(?s){said}"):
        models.load_reward_model(settings(llama), tmp_path, "cpu", trainable=False)
    with pytest.raises(UserError, match=f"(?s){said}"):
        SharedBase(settings(llama), Lora(r=2), tmp_path, torch.device("cpu"), seed=0)


def test_a_reward_model_without_a_layer_is_refused_in_rl(llama: Path, tmp_path: Path) -> None:
    model = models.new_reward_model(settings(llama), Lora(r=2), "cpu", 0)
    model.save_pretrained(str(tmp_path / "rm"))
    SharedBase(settings(llama), Lora(r=2), tmp_path / "rm", torch.device("cpu"), seed=0)
    rewrite(tmp_path / "rm" / ADAPTER, lambda w: {k: v for k, v in w.items() if ".layers.2." not in k})
    with pytest.raises(UserError, match="are missing"):
        SharedBase(settings(llama), Lora(r=2), tmp_path / "rm", torch.device("cpu"), seed=0)
    with pytest.raises(UserError, match="are missing"):
        models.load_reward_model(settings(llama), tmp_path / "rm", "cpu", trainable=False)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"n_positions": 1024}, 1024),
        ({"max_seq_len": 2048}, 2048),
        ({}, None),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"type": "longrope"},
                "original_max_position_embeddings": 4096,
            },
            4096,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096},
            },
            4096,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 8192},
            },
            131072,
        ),
    ],
)
def test_how_much_a_model_reads(config: dict[str, Any], limit: int | None) -> None:
    assert context_limit(config) == limit


@pytest.mark.parametrize("where", ["folder", "cache"])
def test_lengths_are_held_against_the_model_before_any_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    folder = tmp_path / "m"
    if where == "cache":
        cache = tmp_path / "models--our--model"
        folder = cache / "snapshots" / "abc"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text("abc")
        monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"max_position_embeddings": 1300}')
    raw["model"]["base"] = str(folder) if where == "folder" else "our/model"
    with pytest.raises(UserError) as error:
        load(raw, ROOT)
    found = re.findall(r"^  (\S.*): \d+ tokens, but", str(error.value), flags=re.M)
    assert found == ["judge.max_length", "ppo.query_length + ppo.response_length"][: len(found)]
    assert "judge.max_length" in found


# ---- check_model


def sections(folder: Path, **more: Any) -> checking.Settings:
    return checking.Settings(
        model=settings(folder),
        policy_prompt=more.get("policy_prompt", PolicyPrompt(template=str(ROOT / "demo/templates/policy.txt"))),
        sampling=Sampling(max_length=more.get("sampling_length", 64)),
        judge=Judge(
            template=str(ROOT / "demo/templates/judge.txt"),
            principles=str(ROOT / "demo/principles/judge.json"),
            max_length=more.get("judge_length", 900),
        ),
        lora=Lora(r=2),
        scoring=more.get("scoring", Scoring()),
        ppo=Ppo(
            template=REWARD,
            principles=str(ROOT / "demo/principles/rl.json"),
            **({"query_length": 400, "response_length": 500, "reward_max_length": 1000} | more.get("ppo", {})),
        ),
    )


ALL: list[checking.Part] = ["sampling", "judging", "training", "rl"]


def test_the_check_passes_what_is_right(llama: Path, adapter: Path) -> None:
    report = checking.check_model(sections(llama), ALL, torch.device("cpu"))
    assert report.refusals == {}
    assert report.facts["judging"]["way"] == "packed"
    assert report.facts["training"]["linear weights without"] == 0
    given = dataclasses.replace(sections(llama), model=settings(llama, adapter=str(adapter)))
    assert checking.check_model(given, ["rl"], torch.device("cpu")).refusals == {}
    assert "## judging: passed" in report.markdown("llama")


def test_the_check_refuses_in_sentences(llama: Path, tmp_path: Path) -> None:
    report = checking.check_model(sections(llama, judge_length=1025), ["judging"], torch.device("cpu"))
    assert "judge.max_length is 1025, but the model reads 1024" in report.refusals["judging"]
    shutil.copytree(llama, tmp_path / "m")
    damage(tmp_path / "m", "no layer")
    report = checking.check_model(sections(tmp_path / "m"), ALL, torch.device("cpu"))
    assert set(report.refusals) == {"weights", "weights of the judge", "training", "rl"}
    assert "are missing" in report.refusals["weights"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AttributeError("no such layer"), "AttributeError: no such layer; .*not supported"),
        (torch.OutOfMemoryError(), "device"),
    ],
)
def test_whatever_is_raised_is_a_refusal(error: Exception, said: str) -> None:
    def fails() -> dict[str, Any]:
        raise error

    report = checking.Report()
    assert not report.check("it", fails)
    assert re.search(said, report.refusals["it"])


def test_an_adapter_that_a_stage_leaves_out_is_noticed_in_16_bit(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of the bare base model are far from those of the reward model, even with what bfloat16 rounds."""
    given = sections(llama)
    given = dataclasses.replace(given, model=given.model.model_copy(update={"dtype": "bfloat16"}))
    report = checking.check_model(given, ["rl"], torch.device("cpu"))
    assert report.refusals == {}
    used = SharedBase.use
    monkeypatch.setattr(
        SharedBase, "use", lambda self, role: self.bare() if role == "reward" else used(self, role), raising=True
    )
    monkeypatch.setattr(SharedBase, "bare", contextmanager(_bare), raising=False)
    report = checking.check_model(given, ["rl"], torch.device("cpu"))
    assert "the reward model and RL's reward differ" in report.refusals["rl"]


def _bare(shared: SharedBase) -> Iterator[SharedBase]:
    with shared.lm.disable_adapter():
        yield shared


def test_a_refusal_leaves_its_report_beside(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "check"
    arguments = check_model.Arguments(
        output=output, model=settings(llama), judge=sections(llama, judge_length=1025).judge, parts=["judging"]
    )
    with pytest.raises(UserError, match=r"reads 1024 .* The whole report is in .*check\.refused"):
        check_model.main(arguments)
    assert not output.exists()
    assert "## judging: refused" in (tmp_path / "check.refused" / "report.md").read_text()
    check_model.main(arguments.model_copy(update={"judge": sections(llama).judge}))
    assert [file.name for file in tmp_path.iterdir()] == ["check"]


def test_large_weights_that_are_no_layers_are_not_left_without_lora(llama: Path) -> None:
    """As of an architecture that holds its experts in one matrix."""
    base = models.load_base(settings(llama), "cpu")
    base.model.layers[0].mlp.register_parameter("experts", torch.nn.Parameter(torch.zeros(512, 256)))
    with pytest.raises(UserError, match=r"would get no LoRA .*mlp\.experts"):
        add_lora(base, Lora(r=2), TaskType.CAUSAL_LM)


@pytest.mark.parametrize(
    ("more", "part", "said"),
    [
        ({"scoring": Scoring(format="chat")}, "training", r"scoring\.format is `chat`, but the tokenizer has no chat"),
        ({"scoring": Scoring(format="chat")}, "rl", r"scoring\.format is `chat`, but the tokenizer has no chat"),
        ({"sampling_length": 1025}, "sampling", r"sampling\.max_length is 1025, but the model reads 1024"),
        ({"ppo": {"reward_max_length": 1025}}, "rl", r"ppo\.reward_max_length is 1025, but the model reads 1024"),
        ({"ppo": {"response_length": 620}}, "rl", r"policy template \+ ppo\.query_length .* is 10\d\d, but the model"),
    ],
)
def test_what_a_later_stage_would_find_is_found_first(llama: Path, more: Any, part: Any, said: str) -> None:
    report = checking.check_model(sections(llama, **more), [part], torch.device("cpu"))
    assert re.search(said, report.refusals[part])


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj"], bias="all"),
        LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 3)]),
        AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10),
    ],
)
def test_an_adapter_that_shares_a_base_with_no_other_is_refused_first(llama: Path, tmp_path: Path, config: Any) -> None:
    """It samples, and may judge; but RL has four adapters on one base."""
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(str(tmp_path / "a"))
    given = dataclasses.replace(sections(llama), model=settings(llama, adapter=str(tmp_path / "a")))
    models.load_initial_policy(given.model, "cpu")
    report = checking.check_model(given, ["rl"], torch.device("cpu"))
    assert f"RL cannot put adapter {tmp_path / 'a'} and" in report.refusals["rl"]


def test_a_tokenizer_of_more_tokens_than_the_model_has(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "m")
    tokenizer = load_tokenizer(settings(llama))
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHATML_TOKENS)})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "m")
    chat = PolicyPrompt(template="chat", stop=["<|im_end|>"])
    said = (
        r"the tokenizer has \d+ tokens and the model embeddings of \d+; prompts hold the token '<\|im_(start|end)\|>'"
    )
    report = checking.check_model(
        sections(tmp_path / "m", policy_prompt=chat, scoring=Scoring(format="chat")), ALL, torch.device("cpu")
    )
    assert set(report.refusals) == {"sampling", "training", "rl"}
    assert all(re.match(said, sentence) for sentence in report.refusals.values())
    assert checking.check_model(sections(tmp_path / "m"), ALL, torch.device("cpu")).refusals == {}


# ---- Chat templates


TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}<|assistant|>"


@pytest.mark.parametrize(
    "template",
    [
        TURN.replace("m.content", "m.content | upper"),
        TURN.replace("m.content", "m.content | tojson"),
        TURN.replace("m.content", "m.content | e"),
        TURN.replace("m.content", "m.content | truncate(200)"),
        TURN.replace("m.content", "m.content.split() | join(' ')"),
        TURN.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}"),
        TURN.replace("messages %}", "messages if m.role == 'human' %}"),
    ],
)
def test_a_chat_template_that_changes_the_instruction_is_refused(template: str) -> None:
    tokenizer = byte_tokenizer(special=CHATML_TOKENS, template=template)
    given = sections(Path(), policy_prompt=PolicyPrompt(template="chat"))
    with pytest.raises(UserError, match="leaves an instruction out, or changes it"):
        checking.prompts(given, tokenizer)
    for right in (TURN, TURN.replace("m.content", "m.content | trim"), CHATML):
        tokenizer.chat_template = right
        checking.prompts(given, tokenizer)


@pytest.mark.parametrize(
    ("after", "stop", "said"),
    [
        ("</s>", [], None),
        (" \n</s>\n", [], None),
        ("<|im_end|>\n", ["<|im_end|>"], None),
        ("\n\n### User\n", ["\n### User\n"], None),
        ("<|im_end|>\n", [], "begins neither with an end token"),
        ("[/end]\n</s>", [], "begins neither with an end token"),  # Phi-3's, of another end token
        ("[/end]\n</s>", ["[/end]"], None),
        ("[/end]\n### User\n", ["\n### User\n"], "begins neither with an end token"),
        ("", [], "begins neither with an end token"),
        (None, [], "leaves an assistant's answer out"),
    ],
)
def test_an_answer_ends_with_what_comes_first_after_it(after: str | None, stop: list[str], said: str | None) -> None:
    turn = "{{ m.content | upper }}" if after is None else f"{{{{ m.content }}}}{{{{ {after!r} }}}}"
    template = f"{{% for m in messages %}}[{{{{ m.role }}}}]{turn}{{% endfor %}}"
    tokenizer = byte_tokenizer(special=CHATML_TOKENS, template=template)
    given = sections(Path(), policy_prompt=PolicyPrompt(template="chat", stop=stop))
    with pytest.raises(UserError, match=said) if said else nullcontext():
        checking.ends_of_turns(given, tokenizer, torch.nn.Module())


def test_a_chat_template_whose_turns_cannot_end_is_refused(llama: Path, tmp_path: Path) -> None:
    """The answer's turn ends with a token that is neither the model's end token nor a stop string."""
    shutil.copytree(llama, tmp_path / "m")
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|over|>{% endfor %}"
    file = tmp_path / "m" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    for stop, refused in (([], True), (["<|over|>"], False)):
        prompt = PolicyPrompt(template="chat", stop=stop)
        report = checking.check_model(sections(tmp_path / "m", policy_prompt=prompt), ["sampling"], torch.device("cpu"))
        assert ("ends of turns" in report.refusals) == refused, report.refusals
