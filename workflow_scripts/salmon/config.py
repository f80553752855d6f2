"""The settings of the workflow: one pydantic model a section of `config.yaml`.

A section is validated when Snakemake starts (`load`) and again by the script that receives it, so a value is
wrong at the same place for the same reason whether it came from the file or from the command line.
What is set here changes what is computed; what only changes where and how fast (GPUs, micro-batches, ZeRO
stage) is a resource of the profile and does not appear here.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from salmon.errors import UserError

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Marker = Annotated[str, Field(min_length=1)]
QuestionType = Literal["general", "reasoning", "red_teaming"]
PromptFormat = Literal["oasst1", "hh_rlhf", "openorca", "sharegpt", "dolly", "math", "prompts"]
PairFormat = Literal["shp", "hh_rlhf"]
SourceFormat = Literal["oasst1", "shp", "hh_rlhf", "openorca", "sharegpt", "dolly", "math", "prompts"]


class Section(BaseModel):
    """Base of all sections: unknown keys and values of another type are errors; nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_switch_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` where a number is wanted would silently become 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are not allowed here")
        return value


class Model(Section):
    """A base model, and the adapter that makes it the initial policy (paper section 3.1)."""

    base: str = Field(description="hub id or local folder of the base model")
    revision: str | None = Field(None, description="commit, tag or branch on the hub; a commit for a frozen run")
    adapter: str | None = Field(None, description="LoRA adapter of the initial policy: hub id, local folder or null")
    adapter_revision: str | None = Field(None, description="commit, tag or branch of the adapter")
    quantization: Literal["nf4", "none"] = Field("nf4", description="4-bit NormalFloat, double quantised, or none")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="of weights and computation")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention kernel")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class Source(Section):
    """One public data set in its upstream schema."""

    format: SourceFormat = Field(description="which upstream schema the rows have")
    path: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="hub id, or local file, folder or list of them (parquet, jsonl[.gz], json)"
    )
    split: str = Field("train", description="split on the hub; not used for local files")
    revision: str | None = Field(None, description="commit, tag or branch on the hub")
    data_files: str | None = Field(None, description="file inside the hub repository, where it has no split")
    limit: Count | None = Field(None, description="at most so many rows (a family, for openorca), drawn with the seed")
    question_type: QuestionType = Field("general", description="decides principles and length bonus at RL time")


class PromptSource(Source):
    """A data set that prompts are taken from."""

    format: PromptFormat = Field(description="which upstream schema the rows have")


class PairSource(Source):
    """A data set of human preferences."""

    format: PairFormat = Field(description="which upstream schema the rows have")


class PathVars(Section):
    """Where things go: Snakemake's path variables."""

    results: str = Field("results", min_length=1)
    logs: str = Field("results/logs", min_length=1)
    benchmarks: str = Field("results/benchmarks", min_length=1)


class PolicyPrompt(Section):
    """How an instruction becomes the policy's prompt, and where its answer ends."""

    template: str = Field(
        description="preamble file that ends with the user's turn marker, or `chat` for the tokenizer's"
    )
    assistant_marker: str = Field("### Dromedary", description="begins the assistant's turn")
    stop: list[Marker] = Field(["\n### User\n"], description="an answer ends before the first of these, or at EOS")


class Prompts(Section):
    """Prompts of the synthetic preferences."""

    sources: dict[str, PromptSource] = Field(min_length=1, description="name -> data set")
    seed: int = Field(42, description="of the draw where a source has a limit")


class RlPrompts(Prompts):
    """Prompts of the RL stage."""

    min_tokens: Count = Field(2, description="shorter instructions are dropped")
    max_tokens: Count = Field(256, description="longer instructions are dropped")
    length_bonus: dict[QuestionType, float] = Field(
        {"general": 1.0, "reasoning": -0.4, "red_teaming": 0.0},
        description="factor of the length reward by question type",
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        missing = {source.question_type for source in self.sources.values()} - set(self.length_bonus)
        if missing:
            raise ValueError(f"length_bonus has no factor for {', '.join(sorted(missing))}")
        return self


class Sampling(Section):
    """response0 and response1."""

    seeds: tuple[int, int] = Field((42, 43), description="of response0 and response1")
    temperature: float = Field(0.7, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    max_length: Count = Field(768, description="tokens of prompt and response together")
    shards: Count = Field(4, description="jobs each response table is scattered over")

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, int]) -> tuple[int, int]:
        if seeds[0] == seeds[1]:
            raise ValueError("the two responses need different seeds")
        return seeds


class Judge(Section):
    """The initial policy as judge of its own responses (paper section 3.2)."""

    template: str = Field(description="file with {UserInstruction} {OutputA} {OutputB} {Dimension} {Definition}")
    principles: str = Field(description="JSON list of dimension, definition, negative_definition")
    max_length: Count = Field(1536, description="tokens; longer prompts are shortened in the responses")
    min_characters: int = Field(16, ge=0, description="pairs with a shorter response are dropped")
    turn_markers: list[Marker] = Field(["\n### User\n"], description="responses are cut at the first of these")
    shards: Count = Field(8, description="jobs the judging is scattered over")


class Aggregation(Section):
    """Judgements to reward-model records (paper section 3.2, reference step 2)."""

    dimensions: list[str] = Field(min_length=1, description="subset of the judged principles")
    passes: Count = Field(4, description="records drawn per pair, at most")
    geometric_p: float = Field(0.2, gt=0, le=1, description="of the number of principles shown")
    max_principles: Count = Field(8, description="the number is redrawn while larger")
    negation_probability: Probability = 0.5
    decision: Literal["dominant", "sum"] = Field("dominant", description="largest |score| decides, or the sum of all")
    refusal_phrase: str = Field("As an AI language model", description="exactly one output has it: the other may win")
    refusal_probability: Probability = Field(0.5, description="with which the refusal rule applies")
    language_rule: bool = Field(True, description="an output in another language than the instruction loses")
    label_noise: Probability = Field(0.1, description="probability that a label is flipped")
    rule_label_noise: Probability = Field(0.25, description="the same, where a rule decided")
    seed: int = 42

    @field_validator("dimensions")
    @classmethod
    def _once(cls, dimensions: list[str]) -> list[str]:
        if twice := sorted({name for name in dimensions if dimensions.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} named twice")
        return dimensions


class PmpData(Section):
    """Public human preferences for pre-training the reward model."""

    sources: dict[str, PairSource] = Field(min_length=1, description="name -> data set of format shp or hh_rlhf")
    min_score_ratio: float = Field(2.0, ge=1, description="SHP pairs must have a larger score ratio")
    seed: int = 42


class Lora(Section):
    """Adapters of all trained models (QLoRA)."""

    r: Count = 64
    alpha: Positive = 16.0
    dropout: Probability = 0.0


class RewardTraining(Section):
    """One stage of reward-model training."""

    template: str = Field(description="file with {Output} {Input} and, for principles, {Dimensions}")
    learning_rate: Positive
    epochs: Positive = 1.0
    batch_size: Count = Field(64, description="pairs a step, over all GPUs")
    max_length: Count = Field(description="tokens of the whole text")
    query_length: Count = Field(description="tokens the instruction is cut to, on its left")
    response_length: Count = Field(description="tokens the response is cut to, on its right")
    warmup_ratio: Probability = 0.03
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: Positive = 0.3
    eval_examples: int = Field(500, ge=0, description="pairs held out, whole prompts at a time")
    save_steps: Count = Field(50, description="steps between two checkpoints")
    seed: int = 42

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.query_length + self.response_length >= self.max_length:
            raise ValueError(
                f"query_length {self.query_length} and response_length {self.response_length} leave no room for the "
                f"template in max_length {self.max_length}"
            )
        return self


class RewardModel(RewardTraining):
    """Principle-following stage."""

    init: Literal["pmp", "base"] = Field("pmp", description="start from the pre-trained reward model, or from the base")


class Ppo(Section):
    """RL against the principle-following reward model (paper section 3.4)."""

    template: str = Field(
        description="reward-model text at RL time: {Output} {Input} {Dimensions}, with the fixed lines"
    )
    principles: str = Field(description="JSON list of dimension, definition, weight")
    principles_per_rollout: int = Field(
        3, ge=0, description="drawn without replacement by weight; 0: none, a control run"
    )
    boost: float = Field(128.0, ge=0, description="added to the weight of principles that fit the question type")
    boosted_words: dict[QuestionType, list[str]] = Field(
        {"reasoning": ["reason", "numerical"], "red_teaming": ["ethical", "harmless"]},
        description="words in a principle's name that fit a question type",
    )
    learning_rate: Positive = 2e-5
    warmup_steps: int = Field(5, ge=0, description="PPO steps of linear warm-up, then cosine to 0")
    epochs: Count = Field(2, description="passes over the prompts")
    max_steps: Count | None = Field(None, description="stop after so many PPO steps")
    rollout_batch_size: Count = Field(576, description="rollouts a PPO step, over all GPUs")
    minibatch_size: Count = Field(288, description="rollouts an optimiser step, over all GPUs")
    inner_epochs: Count = Field(2, description="passes over the rollouts of a step")
    temperature: Positive = 0.7
    query_length: Count = Field(256, description="tokens of the instruction at most; longer ones are left out")
    response_length: Count = Field(1024, description="tokens sampled at most")
    reward_query_length: Count = Field(128, description="tokens of the instruction the reward model reads")
    reward_response_length: Count = Field(768, description="tokens of the response the reward model reads")
    reward_max_length: Count = Field(1280, description="tokens of the whole text the reward model reads")
    kl_coefficient: float = Field(0.01, ge=0, description="fixed")
    kl_estimator: Literal["k1", "k3"] = Field("k1", description="per-token KL estimate in the reward")
    gamma: Probability = 1.0
    lam: Probability = 1.0
    clip: Positive = 0.2
    value_clip: Positive = 0.2
    value_coefficient: float = Field(0.1, ge=0)
    max_grad_norm: Positive = 1.0
    whiten_advantages: bool = True
    stop_penalty: float = Field(-6.0, le=0, description="reward of a response that did not end by itself")
    length_reward: float = Field(5.0, description="factor of the length reward")
    length_reward_cap: float = Field(0.8, description="largest length share that is rewarded")
    save_steps: Count = 10
    seed: int = 42

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        if self.reward_query_length + self.reward_response_length >= self.reward_max_length:
            raise ValueError(
                f"reward_query_length {self.reward_query_length} and reward_response_length "
                f"{self.reward_response_length} leave no room for the template in reward_max_length "
                f"{self.reward_max_length}"
            )
        if self.rollout_batch_size % self.minibatch_size:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} is no multiple of minibatch_size {self.minibatch_size}"
            )
        return self


Target = Literal[
    "prompts",
    "response0",
    "response1",
    "preferences",
    "reward_data",
    "pmp_data",
    "pmp",
    "reward_model",
    "rl_prompts",
    "policy",
    "policies",
    "evaluation",
]
SEED_STEP = 1000  # larger than the distance of two seeds in one configuration, so that no draw comes twice
RunSection = Literal["aggregation", "pmp", "reward_model", "rl_prompts", "ppo"]


class Config(Section):
    """The whole of `config.yaml`."""

    pathvars: PathVars = PathVars()
    targets: list[Target] = Field(["policy"], min_length=1, description="what is built where no target is named")
    seed: int = Field(0, ge=0, description=f"{SEED_STEP} times this is added to every seed of the sections")
    model: Model
    policy_prompt: PolicyPrompt
    prompts: Prompts
    sampling: Sampling
    judge: Judge
    aggregation: Aggregation
    pmp_data: PmpData
    lora: Lora
    pmp: RewardTraining
    reward_model: RewardModel
    rl_prompts: RlPrompts
    ppo: Ppo
    runs: dict[Annotated[str, Field(pattern=r"^\w+$")], dict[RunSection, dict[str, Any]]] = Field(
        {"default": {}}, description="policies: name -> the settings that differ from the sections above"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_and_remove(cls, raw: Any) -> Any:
        """Fill in `<results>`; what a configuration that is read over another one sets to null is removed."""
        if not isinstance(raw, dict):
            return raw
        pathvars = raw.get("pathvars")
        results = pathvars.get("results") if isinstance(pathvars, dict) else None
        raw = _fill_results(raw, results if isinstance(results, str) else PathVars().results)
        for name in ("prompts", "pmp_data", "rl_prompts"):
            section = raw.get(name)
            if isinstance(section, dict) and isinstance(section.get("sources"), dict):
                raw[name] = {**section, "sources": {k: v for k, v in section["sources"].items() if v is not None}}
        if isinstance(raw.get("runs"), dict):
            raw["runs"] = {key: value for key, value in raw["runs"].items() if value is not None}
        return raw

    @field_validator("runs")
    @classmethod
    def _default_is_plain(cls, runs: dict[str, Any]) -> dict[str, Any]:
        if runs.get("default") != {}:
            raise ValueError("there must be a run `default: {}`; what it should do is set in the sections above")
        return runs


def describe_errors(error: ValidationError, where: str) -> str:
    """Pydantic's findings as lines of `key: what is wrong (got value)`, for a person who edits the file."""
    lines = []
    for finding in error.errors(include_url=False):
        key = ".".join(str(part) for part in finding["loc"]) or "(top level)"
        message = finding["msg"].removeprefix("Value error, ")
        if finding["type"] == "extra_forbidden":
            message = "unknown key"
        elif finding["type"] == "missing":
            lines.append(f"  {key}: required, but not set")
            continue
        got = repr(finding["input"])
        lines.append(f"  {key}: {message} (got {got if len(got) <= 100 else got[:97] + '...'})")
    return f"{where} is not valid:\n" + "\n".join(lines)


def load(raw: dict[str, Any], root: Path, where: str = "the configuration") -> Config:
    """Validate a raw configuration and everything it points to that can be checked before any job.

    Args:
        raw: the merged configuration, as Snakemake holds it.
        root: folder that relative paths start from.
        where: name of the configuration in error messages.

    Raises:
        UserError: with one line for every finding: key, value, what is allowed.
    """
    from salmon.principles import check_principles
    from salmon.templates import check_templates

    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(describe_errors(error, where)) from None
    findings = []
    for name, run in resolve_runs(config).items():
        of_run = "" if name == "default" else f"runs.{name}: "
        for check in (check_templates, check_principles, check_paths):
            findings += [f"{of_run}{finding}" for finding in check(run, root) if finding not in findings]
    if findings:
        raise UserError(f"{where} is not valid:\n" + "\n".join(f"  {finding}" for finding in findings))
    return config


def resolve_runs(config: Config) -> dict[str, Config]:
    """The configuration of every run: the sections, with what the run sets differently. `default` comes first.

    `seed` is worked into the seeds of the sections.

    Raises:
        UserError: with one line for every finding, as `load` does.
    """
    resolved = {"default": config}
    for name, changes in config.runs.items():
        raw = _merge(config.model_dump(mode="json"), changes)
        try:
            resolved[name] = Config.model_validate(raw)
        except ValidationError as error:
            raise UserError(describe_errors(error, f"run {name}")) from None
    return {name: _shift_seeds(run) for name, run in resolved.items()}


def _shift_seeds(config: Config) -> Config:
    """Add to every seed of the sections what `seed` says."""
    step = SEED_STEP * config.seed
    raw = config.model_dump(mode="json")
    for section in raw.values():
        if isinstance(section, dict) and "seed" in section:
            section["seed"] += step
    raw["sampling"]["seeds"] = [seed + step for seed in raw["sampling"]["seeds"]]
    return Config.model_validate(raw)


def _fill_results(raw: Any, results: str) -> Any:
    """Put the results' folder where a text of the configuration has `<results>`."""
    if isinstance(raw, dict):
        return {key: _fill_results(value, results) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_fill_results(value, results) for value in raw]
    return raw.replace("<results>", results) if isinstance(raw, str) else raw


def _merge(base: dict[str, Any], changes: dict[Any, Any]) -> dict[str, Any]:
    """Mappings key by key, to any depth; everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def is_local(path: str) -> bool:
    """Whether a path names a local file or folder: `name` and `owner/name` without a file ending are hub ids.

    A relative path with more parts, a leading dot, slash or tilde, or a data file's ending is local; so is
    anything that exists.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    return looks_local or path.endswith((".json", ".jsonl", ".gz", ".parquet")) or Path(path).exists()


def check_paths(config: Config, root: Path) -> list[str]:
    """Findings about local files and folders that the configuration names and that do not exist.

    Files below the results are made by the workflow and are not looked for.
    """
    results = config.pathvars.results
    named = [("model.base", config.model.base), ("model.adapter", config.model.adapter)]
    for section in ("prompts", "pmp_data", "rl_prompts"):
        for name, source in getattr(config, section).sources.items():
            paths = [source.path] if isinstance(source.path, str) else source.path
            named += [(f"{section}.sources.{name}.path", path) for path in paths]
    return [
        f"{key}: {path} does not exist (local file or folder; a hub id has the form owner/name)"
        for key, path in named
        if path
        and is_local(path)
        and not path.startswith(f"{results}/")
        and not (root / Path(path).expanduser()).exists()
    ]
