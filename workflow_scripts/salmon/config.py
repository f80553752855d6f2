"""The settings of the workflow: one pydantic model for each section of `config.yaml`.

A section is validated when Snakemake starts (`configuration.load`) and again by the script that receives it. A wrong
value therefore gives the same error for the file and for the command line. Settings here change what is computed.
Settings that only change where and how fast it is computed (GPUs, tokens per pass, ZeRO stage) are resources of the
profile and do not appear here. `make docs-reference` writes `config.schema.json` and docs/configuration.md from these
models.
"""

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from salmon.border import LARGEST, Number
from salmon.errors import in_field
from salmon.formats import EXAMPLE_FORMATS, PAIR_FORMATS, PROMPT_FORMATS, QUESTION_TYPES, QuestionType

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Shards = Annotated[int, Field(ge=1, le=100_000)]
Tokens = Annotated[int, Field(ge=1, le=10_000_000)]  # more than any model reads
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as numpy takes them
Marker = Annotated[str, Field(min_length=1)]
Engine = Literal["transformers", "vllm"]
VLLM_TEMPERATURES = (0.01, 2.0)
"""Range that vLLM accepts, apart from 0: it silently raises lower temperatures and refuses higher ones."""


def check_engine_temperature(engine: Engine, temperature: float) -> None:
    """Refuse a temperature that an engine does not support."""
    low, high = VLLM_TEMPERATURES
    if engine == "vllm" and temperature and not low <= temperature <= high:
        raise in_field(
            "temperature", f"{temperature} is not possible with the engine vllm; set it to 0 or from {low} to {high}"
        )


COLDEST = 0.001  # below this, the most probable token is drawn anyway, and rounding decides what is learned from it
# Names that transformers passes to a chat template itself or treats as its own options.
_RESERVED_VARIABLES = frozenset(
    {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding"}
    | {"continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask"}
)


def _check_variables(variables: dict[str, Any]) -> dict[str, Any]:
    """Refuse names that cannot be passed to a chat template."""
    if wrong := sorted(name for name in variables if not name.isidentifier() or name in _RESERVED_VARIABLES):
        raise ValueError(f"{', '.join(wrong)} cannot be set; use names that are identifiers and not reserved")
    return variables


TemplateVariables = Annotated[dict[str, str | int | float | bool | None], AfterValidator(_check_variables)]


@dataclass(frozen=True)
class OneOf:
    """Annotation of a string that must be one of a set of registered names."""

    names: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check the name after the type."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """List the names for editors."""
        return {**handler(schema), "enum": list(self.names)}

    def _check(self, name: str) -> str:
        if name not in self.names:
            raise ValueError(f"must be one of {', '.join(map(repr, self.names))}")
        return name


@dataclass(frozen=True)
class Free:
    """Annotation of a field that changes how the work is done, but not its results (except by rounding).

    Changing it reruns no rule, restarts no training and makes no artifact stale.
    """


FREE = Free()


class Section(BaseModel):
    """Base of all sections: unknown keys and values of a wrong type are errors; sections are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def free(self) -> dict[str, Any]:
        """The fields marked `FREE`, as name -> value; a nested section's fields are named `section.name`."""
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if FREE in field.metadata:
                found[name] = value
            elif isinstance(value, Section):
                found |= {f"{name}.{below}": item for below, item in value.free().items()}
        return found

    def deciding(self) -> dict[str, Any]:
        """The fields that decide the results, that is, all that are not free, as JSON types."""
        dumped = self.model_dump(mode="json")
        for name in self.free():
            *sections, last = name.split(".")
            place = dumped
            for section in sections:
                place = place[section]
            del place[last]
        return dumped

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Without this check, `true` in place of a number would silently become 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are not allowed here")
        return value

    @field_validator("*")
    @classmethod
    def _reject_what_overflows(cls, value: Any) -> Any:
        """Models compute in single precision, where even a finite number can overflow."""
        if isinstance(value, int | float) and abs(value) > LARGEST:
            raise ValueError(f"must not be larger than {LARGEST:.0e}")
        return value


class Model(Section):
    """A base model and the adapter that turns it into the initial policy (paper section 3.1)."""

    base: str = Field(description="hub id or local folder of the base model")
    revision: str | None = Field(None, description="commit, tag or branch on the hub; pin a commit to freeze a run")
    adapter: str | None = Field(
        None,
        description="LoRA adapter of the initial policy, with its tokenizer if it has one: hub id, folder, `sft` (made "
        "by `train_sft`) or null",
    )
    adapter_revision: str | None = Field(None, description="commit, tag or branch of the adapter")
    quantization: Literal["nf4", "none"] = Field("nf4", description="4-bit NormalFloat, double quantised, or none")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="number type of weights and computation; RL refuses float16"
    )
    attention: Annotated[Literal["sdpa", "eager", "flash_attention_2"], FREE] = Field(
        "sdpa", description="attention kernel; the judge uses sdpa if this is flash_attention_2"
    )
    trust_remote_code: bool = Field(False, description="whether to run Python code that comes with the model")

    def without_adapter(self) -> Self:
        """The base model alone, from which reward models are trained."""
        return self.model_copy(update={"adapter": None, "adapter_revision": None})

    def with_adapter(self, folder: Path) -> Self:
        """The base model with the adapter in a folder."""
        return self.model_copy(update={"adapter": str(folder), "adapter_revision": None})

    @field_validator("base", "adapter")
    @classmethod
    def _in_full(cls, name: str | None) -> str | None:
        """Expand `~` in a path, which most libraries do not do."""
        return name and os.path.expanduser(name)


class Source(Section):
    """One public data set in its upstream schema."""

    format: str = Field(description="upstream schema of the rows")
    path: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="hub id, local file or folder, or a list of them (parquet, jsonl, json, the last two also gzipped)"
    )
    split: str = Field("train", description="split on the hub; ignored for local files")
    revision: str | None = Field(None, description="commit, tag or branch on the hub")
    data_files: str | None = Field(None, description="file inside the hub repository, if it has no splits")
    limit: Count | None = Field(
        None,
        description="maximum number of prompts (for openorca: per family), pairs or examples after cleaning, drawn "
        "with the seed",
    )
    max_bad_rows: int = Field(
        0, ge=0, description="up to this many rows that do not fit the format are skipped and counted; more are errors"
    )
    question_type: QuestionType = Field(
        "general", description="used only for RL prompts, where it decides which principles and length bonus apply"
    )

    @property
    def paths(self) -> list[str]:
        """The path or paths, as a list."""
        return [self.path] if isinstance(self.path, str) else self.path


class PromptSource(Source):
    """A data set of prompts."""

    format: Annotated[str, OneOf(PROMPT_FORMATS)] = Field(description="upstream schema of the rows")


class PairSource(Source):
    """A data set of human preferences."""

    format: Annotated[str, OneOf(PAIR_FORMATS)] = Field(description="upstream schema of the rows")


class JudgedPairSource(PairSource):
    """A data set of human preferences that the judge is tested on."""

    principles: list[str] | None = Field(
        None, description="names of the principles that these preferences are about; null tries each principle"
    )


class ExampleSource(Source):
    """A data set of instructions with answers."""

    format: Annotated[str, OneOf(EXAMPLE_FORMATS)] = Field(description="upstream schema of the rows")


class PathVars(Section):
    """Output folders, which are Snakemake's path variables."""

    results: str = Field("results", min_length=1, description="folder of all artifacts")
    logs: str = Field("results/logs", min_length=1, description="folder of the logs, one log per job")
    benchmarks: str = Field("results/benchmarks", min_length=1, description="folder of run time and memory, per job")

    @field_validator("*", mode="after")
    @classmethod
    def _plain(cls, path: str) -> str:
        if wrong := sorted({mark for mark in path if mark in "{}<>*?[]" or not mark.isprintable()}):
            raise ValueError(f"{' '.join(map(repr, wrong))} cannot be part of this path")
        return str(PurePosixPath(path))  # `results/` becomes `results`


class PolicyPrompt(Section):
    """How an instruction becomes the policy's prompt, and where its answer ends."""

    template: str = Field(
        description="preamble file that ends with the user's turn marker, or `chat` for the tokenizer's chat template"
    )
    assistant_marker: str = Field("### Dromedary", description="text that begins the assistant's turn")
    template_variables: TemplateVariables = Field(
        {}, description="extra variables for the tokenizer's chat template, such as `{enable_thinking: false}`"
    )
    stop: list[Marker] = Field(
        ["\n### User\n"], description="texts that end an answer, like EOS; they are not part of it"
    )
    thinking: tuple[Marker, Marker] | None = Field(
        ("<think>", "</think>"),
        description="markers that open and close thinking, which is cut out of answers before they are read; or null",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.template_variables and not self.is_chat:
            raise in_field("template_variables", "only chat templates take variables; set {section}.template to `chat`")
        if self.thinking and self.thinking[0] == self.thinking[1]:
            raise in_field("thinking", "the two markers must differ")
        return self

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer's chat template builds the prompt."""
        return self.template == "chat"

    @property
    def files(self) -> list[str]:
        """The template's file, if it has one."""
        return [] if self.is_chat else [self.template]


class TaskPrompt(Section):
    """The part of `policy_prompt` that decides how lm-eval's tasks are asked."""

    template: Literal["chat"] | None = Field(
        None, description="`chat`: questions as turns of the tokenizer's chat template"
    )
    template_variables: TemplateVariables = Field({}, description="extra variables for that template")
    thinking: tuple[Marker, Marker] | None = Field(None, description="markers that open and close thinking, or null")

    @classmethod
    def of(cls, prompt: PolicyPrompt, tasks_format: Literal["policy", "text", "chat"]) -> Self:
        """The task prompt for a run's policy under `evaluation.tasks_format`."""
        is_chat = prompt.is_chat if tasks_format == "policy" else tasks_format == "chat"
        return cls(
            template="chat" if is_chat else None,
            template_variables=prompt.template_variables if is_chat else {},
            thinking=prompt.thinking,
        )


def _expanded(path: str | None) -> str | None:
    """Expand `~` in a path, which most libraries do not do."""
    return path and os.path.expanduser(path)


ReadyFile = Annotated[str, AfterValidator(_expanded)]


def _local(path: str) -> str:
    """Refuse anything but a local file: the authors' tables are not downloaded automatically."""
    if not is_local(path):
        raise ValueError(f"{path} is not a local file; download the table and give the file's path with its extension")
    return path


def _two_files(paths: tuple[str, str]) -> tuple[str, str]:
    """Refuse the same file for both responses."""
    if Path(paths[0]).resolve() == Path(paths[1]).resolve():
        raise ValueError("the two responses must be in two different files")
    return paths


ReadyTable = Annotated[ReadyFile, AfterValidator(_local)]
ResponseFiles = Annotated[tuple[ReadyTable, ReadyTable], AfterValidator(_two_files)]


class Prompts(Section):
    """Prompts for the synthetic preferences."""

    sources: dict[str, PromptSource] = Field(min_length=1, description="name -> data set")
    seed: Seed = Field(42, description="seed of the draw if a source has a limit")


class RlPrompts(Prompts):
    """Prompts for the RL stage."""

    min_tokens: Tokens = Field(
        2,
        description="smallest number of tokens of an instruction, including its input and the beginning-of-text token; "
        "shorter instructions are dropped",
    )
    max_tokens: Tokens = Field(
        256, description="largest number of tokens of an instruction, counted in the same way; longer ones are dropped"
    )
    length_bonus: dict[QuestionType, Number] = Field(
        {"general": 1.0, "reasoning": -0.4, "red_teaming": 0.0},
        description="factor of the length reward by question type",
    )

    @field_validator("length_bonus")
    @classmethod
    def _complete(cls, factors: dict[QuestionType, float]) -> dict[QuestionType, float]:
        # Every type needs a factor, because rows of a source may set their own type.
        if missing := [kind for kind in QUESTION_TYPES if kind not in factors]:
            raise ValueError(f"no factor for {', '.join(missing)}; set one for every question type")
        return factors

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise in_field("min_tokens", f"{self.min_tokens} is above {{section}}.max_tokens {self.max_tokens}")
        return self


class Sampling(Section):
    """response0 and response1."""

    paths: ResponseFiles | None = Field(
        None,
        description="existing response0 and response1, as two response files of the authors' release; null samples "
        "them. The first is output 1 of the judging",
    )
    engine: Engine = Field(
        "transformers",
        description="sampler of both responses: `transformers`, our own loop, which is the reference; or `vllm`, which "
        "is installed separately (docs/engines.md) and draws different tokens",
    )
    seeds: tuple[Seed, Seed] = Field((42, 43), description="seeds of response0 and response1")
    temperature: float = Field(0.7, ge=0, le=1000, description="sampling temperature; 0 takes the most probable token")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="tokens are drawn from the smallest set of most probable ones whose probabilities reach this sum",
    )
    max_length: Tokens = Field(
        768,
        description="largest number of tokens of prompt and response together, not counting the preamble that all "
        "prompts share",
    )
    shards: Annotated[Shards, FREE] = Field(4, description="number of jobs that each table of responses is split into")

    @model_validator(mode="after")
    def _engine_samples_at_it(self) -> Self:
        check_engine_temperature(self.engine, self.temperature)
        return self

    @field_validator("temperature")
    @classmethod
    def _not_nearly_zero(cls, temperature: float) -> float:
        if 0 < temperature < COLDEST:
            raise ValueError(f"a temperature below {COLDEST} has the same effect as 0; set it to 0")
        return temperature

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, int]) -> tuple[int, int]:
        if seeds[0] == seeds[1]:
            raise ValueError("the two responses need different seeds")
        return seeds


class Scored(Section):
    """How a scoring model reads its template."""

    format: Literal["text", "chat"] = Field(
        "text", description="`text`: the file unchanged; `chat`: its parts as turns of the tokenizer's chat template"
    )
    template_variables: TemplateVariables = Field(
        {}, description="extra variables for the chat template, such as `{enable_thinking: false}`"
    )

    @model_validator(mode="after")
    def _variables_fit(self) -> Self:
        if self.template_variables and self.format != "chat":
            raise in_field("template_variables", "only chat templates take variables; set {section}.format to `chat`")
        return self


class Scoring(Scored):
    """How the reward model reads its texts, in pre-training, training and RL alike."""


class Judge(Scored):
    """The judge of the responses: the initial policy (paper section 3.2), or another model."""

    path: ReadyTable | None = Field(
        None,
        description="existing judgements, as a preference file of the authors' release about the responses in "
        "sampling.paths; null judges them",
    )
    model: Model | None = Field(None, description="null: the initial policy judges, as in the paper; or a section")
    template: str = Field(
        description="template file with the slots {UserInstruction} {OutputA} {OutputB} {Dimension} {Definition}"
    )
    principles: str = Field(description="JSON file with a list of objects: dimension, definition, negative_definition")
    max_length: Tokens = Field(
        1536, description="largest number of tokens of a prompt; in longer prompts, the responses are shortened"
    )
    min_characters: int = Field(
        16,
        ge=0,
        description="smallest number of characters of a response; pairs with a shorter one are dropped, except in "
        "measurements",
    )
    turn_markers: list[Marker] = Field(["\n### User\n"], description="responses are cut at the first of these")
    shards: Annotated[Shards, FREE] = Field(8, description="number of jobs that the judging is split into")


class Aggregation(Section):
    """How judgements become reward-model records (paper section 3.2)."""

    path: ReadyTable | None = Field(
        None,
        description="existing records, as a file of the authors' release with principles that judge.principles "
        "defines; null makes records from the judgements",
    )
    dimensions: list[str] = Field(min_length=1, description="names of the judged principles that are used")
    passes: Count = Field(4, le=1000, description="largest number of records drawn per pair")
    geometric_p: float = Field(
        0.2,
        gt=0,
        le=1,
        description="parameter of the geometric distribution from which the number of principles shown is drawn",
    )
    max_principles: Count = Field(8, description="largest number of principles shown; larger draws are repeated")
    negation_probability: Probability = Field(0.5, description="probability that a principle shown is negated")
    agreement: Literal["both_orders", "mean"] = Field(
        "both_orders",
        description="`both_orders`: a principle prefers neither output if the judge's two orders disagree, as in the "
        "paper; `mean`: the mean of both orders counts, which cancels out the judge's position bias",
    )
    decision: Literal["dominant", "sum"] = Field(
        "dominant",
        description="`dominant`: the largest |score| of the principles shown decides a pair; `sum`: their sum decides",
    )
    refusal_phrase: str = Field(
        "As an AI language model",
        description="text that marks a refusal; if exactly one output contains it, the other one may win by rule",
    )
    refusal_probability: Probability = Field(0.5, description="probability that the refusal rule applies")
    language_rule: bool = Field(
        True, description="whether an output in a different language from the instruction loses"
    )
    label_noise: Probability = Field(0.1, description="probability that a label is flipped")
    rule_label_noise: Probability = Field(0.25, description="probability that a label is flipped if a rule decided")
    seed: Seed = Field(42, description="seed of all draws of the aggregation")

    @field_validator("dimensions")
    @classmethod
    def _once(cls, dimensions: list[str]) -> list[str]:
        if twice := sorted({name for name in dimensions if dimensions.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} named twice; name each principle once")
        return dimensions


class PmpData(Section):
    """Public human preferences for pre-training the reward model."""

    sources: dict[str, PairSource] = Field(min_length=1, description="name -> data set")
    min_score_ratio: float = Field(
        2.0, ge=1, description="pairs with a score ratio (SHP) need a larger ratio than this"
    )
    seed: Seed = Field(42, description="seed of the order of outputs and records, and of the draw under a limit")


class SftData(Section):
    """Instructions with answers, used to train the initial policy if `model.adapter` is `sft`."""

    sources: dict[str, ExampleSource] = Field(min_length=1, description="name -> data set")
    seed: Seed = Field(42, description="seed of the draw if a source has a limit")


class Lora(Section):
    """Adapters of all trained models (QLoRA); their weights are float32 (bfloat16 in the paper's RL)."""

    r: Count = Field(64, le=16384, description="rank of the adapters")
    alpha: Positive = Field(16.0, description="numerator of the scale alpha / r of the adapters' outputs")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="dropout of the adapters' inputs while a reward model or the initial policy is trained",
    )


class Training(Section):
    """How an adapter is trained by gradient descent on examples."""

    learning_rate: Rate = Field(description="peak learning rate, after linear warm-up and before half a cosine to 0")
    epochs: Positive = Field(1.0, le=1000, description="number of passes over the records; may be fractional")
    batch_size: Count = Field(64, description="pairs per step, over all GPUs")
    max_length: Tokens = Field(description="largest number of tokens of the whole text")
    warmup_ratio: Probability = Field(0.03, description="share of the steps during which the rate rises")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    max_grad_norm: Positive = Field(0.3, description="gradients with a larger norm are scaled down to this norm")
    eval_examples: int = Field(500, ge=0, description="number of records held out, by whole prompts")
    save_steps: Annotated[Count, FREE] = Field(50, description="number of steps between two checkpoints")
    seed: Seed = Field(42, description="seed of the split, the order of the records and the new weights")


class Sft(Training):
    """Supervised fine-tuning of the base model, which makes the initial policy."""

    batch_size: Count = Field(128, description="examples per step, over all GPUs")
    max_length: Tokens = Field(
        1024,
        description="largest number of tokens of prompt and answer; a longer answer is cut, and its end is not learned",
    )
    eval_examples: int = Field(
        500, ge=0, description="number of examples held out for the loss in metrics.json, by whole prompts"
    )


class RewardTraining(Training):
    """One stage of reward-model training."""

    template: str = Field(description="template file with the slots {Output} {Input} and, for principles, {Dimensions}")
    query_length: Tokens = Field(description="largest number of tokens of the instruction, which is cut on its left")
    response_length: Tokens = Field(description="largest number of tokens of the response, which is cut on its right")
    eval_examples: int = Field(
        500,
        ge=0,
        description="number of pairs held out for evaluation, by whole prompts; the paper holds none out, "
        "and evaluates on 500 human preferences from another data set",
    )

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.query_length + self.response_length >= self.max_length:
            raise in_field(
                "max_length",
                f"{self.max_length} leaves no room for the template next to {{section}}.query_length "
                f"{self.query_length} and {{section}}.response_length {self.response_length}",
            )
        return self


class RewardModel(RewardTraining):
    """The principle-following stage of the reward model."""

    path: ReadyFile | None = Field(
        None,
        description="existing reward model, as a hub id or folder, in our layout or in the layout of the authors' "
        "release; null trains one",
    )
    revision: str | None = Field(None, description="commit, tag or branch of that reward model on the hub")
    init: Literal["pmp", "base"] = Field(
        "pmp", description="model that training starts from: the pre-trained reward model, or the base model"
    )


class JudgeEndpoint(Section):
    """A model behind an OpenAI-compatible endpoint that compares each policy's answers with the initial policy's."""

    url: Annotated[str, FREE] = Field(
        description="URL of the API, such as `http://localhost:8000/v1`; `/chat/completions` is appended"
    )
    model: str = Field(min_length=1, description="name of the model at the endpoint")
    key_variable: Annotated[str | None, FREE] = Field(
        None,
        pattern=r"^[A-Za-z_]\w*$",
        description="name of the environment variable that holds the API key, if one is needed",
    )
    template: str = Field(
        "prompts/templates/endpoint.txt",
        description="template file with the slots {UserInstruction} {OutputA} {OutputB}",
    )
    options: dict[str, str | int | float | bool] = Field(
        {"temperature": 0, "max_tokens": 1024}, description="fields of a request other than model and messages"
    )
    max_requests: Annotated[Count, FREE] = Field(8, le=1000, description="largest number of requests at once")
    timeout: Annotated[Positive, FREE] = Field(120.0, description="seconds until a request counts as failed")
    retries: Annotated[int, FREE] = Field(
        8, ge=0, le=1000, description="number of times that a request is sent again after a temporary failure"
    )
    max_refused: Annotated[Probability, FREE] = Field(
        0.1, description="share of comparisons that the endpoint may refuse, for example by a filter; more are an error"
    )

    @field_validator("url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            port_is_one = parts.port is None or parts.port > 0
        except ValueError:
            port_is_one = False
        if not (port_is_one and parts.scheme in ("http", "https") and parts.hostname):
            raise ValueError("must be a URL that begins with http:// or https://")
        if parts.username or parts.password or parts.query or parts.fragment:
            # The address is not shown, as it may contain a key.
            raise PydanticCustomError("address", "must not contain a name, key or query; see key_variable for the key")
        return url.rstrip("/")


class Evaluation(Section):
    """What is measured of judge, reward models and policies after their training."""

    prompts: dict[str, PromptSource] = Field(
        {}, description="name -> prompts that policies answer; prompts used in training are left out"
    )
    engine: Engine = Field(
        "transformers",
        description="sampler of the answers to evaluation.prompts and MT-Bench; same choices as `sampling.engine`",
    )
    against: str | list[str] | None = Field(
        None,
        description="runs whose answers the judge compares with those of all other runs, besides comparing each run "
        "with its initial policy: a name, such as that of a control run, a list of names, or `all` for each pair of "
        "runs; null for none",
    )
    pairs: dict[str, PairSource] = Field(
        {},
        description="name -> human preferences that reward models are tested on; those about queries that PMP trains "
        "on are left out",
    )
    judge_pairs: dict[str, JudgedPairSource] = Field(
        {}, description="name -> human preferences that the judge is tested on, under each principle"
    )
    min_score_ratio: float = Field(
        2.0, ge=1, description="pairs with a score ratio (SHP) need a larger ratio than this"
    )
    seed: Seed = Field(42, description="seed of the order of outputs, the draw under a limit, and the intervals")
    tasks: list[Marker] = Field(
        [], description="tasks of lm-eval and of `evaluation_tasks` that every policy and the initial one are asked"
    )
    tasks_limit: Count | None = Field(
        None, description="only this many questions of each task are asked, the first ones"
    )
    tasks_format: Literal["policy", "text", "chat"] = Field(
        "policy",
        description="`text`: questions as documents, which the model continues; `chat`: as turns of the tokenizer's "
        "chat template; `policy`: as turns if policy_prompt.template is `chat`, else as documents",
    )
    tasks_data: dict[str, ReadyFile] = Field(
        {}, description="local copies of tasks' data: `hhh`, a folder, and `truthfulqa`, a file (docs/evaluation.md)"
    )
    tasks_folder: ReadyFile | None = Field(
        None, description="folder of more tasks in lm-eval's YAML, which may run Python code from the same folder"
    )
    mt_bench: ReadyFile | None = Field(
        None, description="FastChat's file of questions, which every policy and the initial one answer; null for none"
    )
    mt_bench_tokens: Tokens = Field(1024, description="largest number of tokens of an answer to MT-Bench")
    judge_endpoint: JudgeEndpoint | None = Field(
        None, description="null, or a section for a model that compares the answers to evaluation.prompts and MT-Bench"
    )

    def opponents(self, runs: Iterable[str]) -> list[str]:
        """The runs of `against`; `runs` are all of them. For `all`, the last is first: pairs are (earlier, later)."""
        if self.against == "all":
            return [*runs][::-1]
        return [self.against] if isinstance(self.against, str) else self.against or []


class Report(Section):
    """Contents of the report."""

    samples: bool = Field(
        False,
        description="whether it also shows answers to prompts of public data sets, some of which are offensive; "
        "answers to your own prompts (local files of format `prompts`) and to the demo's are always shown",
    )


class PpoTexts(Section):
    """The settings of RL that are checked with the model: the lengths and the template of its texts."""

    template: str = Field(
        description="template file of the reward model's text in RL: {Output} {Input} {Dimensions}, and fixed lines"
    )
    query_length: Tokens = Field(
        256,
        description="largest number of tokens of a whole prompt: preamble, instruction and markers; longer ones are "
        "dropped",
    )
    response_length: Tokens = Field(1024, description="largest number of tokens sampled")
    reward_query_length: Tokens = Field(
        128, description="largest number of tokens of the instruction that the reward model reads"
    )
    reward_response_length: Tokens = Field(
        768, description="largest number of tokens of the response that the reward model reads"
    )
    reward_max_length: Tokens = Field(
        1280, description="largest number of tokens of the whole text that the reward model reads"
    )


class Ppo(PpoTexts):
    """RL against the principle-following reward model (paper section 3.4)."""

    principles: str = Field(description="JSON file with a list of objects: dimension, definition, weight")
    principles_per_rollout: int = Field(
        3,
        ge=0,
        description="number of principles shown, drawn by weight without replacement; 0 shows none, for a control run",
    )
    boost: float = Field(128.0, ge=0, description="added to the weight of principles that fit the question type")
    boosted_words: dict[QuestionType, list[Marker]] = Field(
        {"reasoning": ["reason", "numerical"], "red_teaming": ["ethical", "harmless"]},
        description="question type -> words; a principle fits the type if its name contains one of them",
    )
    learning_rate: Rate = Field(2e-5, description="peak learning rate of policy and value model")
    warmup_steps: int = Field(5, ge=0, description="PPO steps of linear warm-up from a rate of 0, before a cosine to 0")
    epochs: Count = Field(2, le=100_000, description="number of passes over the prompts")
    max_steps: Count | None = Field(None, description="largest number of PPO steps, if the epochs have more")
    rollout_batch_size: Count = Field(576, description="rollouts per PPO step, over all GPUs")
    minibatch_size: Count = Field(288, description="rollouts per optimiser step, over all GPUs")
    inner_epochs: Count = Field(2, le=100_000, description="number of passes over the rollouts of a step")
    temperature: float = Field(
        0.7, ge=COLDEST, le=1000, description="sampling temperature; PPO optimises the policy at this temperature"
    )
    engine: Engine = Field(
        "transformers",
        description="sampler of the rollouts: `transformers`, our own loop, which is the reference; or `vllm`, which "
        "is installed separately (docs/engines.md) and draws different tokens",
    )
    rollout_correction: Literal["truncated", "none"] = Field(
        "truncated",
        description="for an engine's rollouts, `truncated`: each token's loss is weighted by pi_trainer / pi_engine, "
        "at most rollout_correction_cap (truncated importance sampling); `none`: no weights",
    )
    rollout_correction_cap: float = Field(2.0, ge=1, description="largest weight of a token's loss")
    cut_markers: list[Marker] = Field(
        ["\nNote", "\nUpdate", "\nComment"],
        description="a response is cut before the first of these and then counts as one that did not end on its own; "
        "such lines praise or amend the response",
    )
    kl_coefficient: float = Field(
        0.01, ge=0, description="coefficient of the KL penalty in the reward, the same at every step"
    )
    kl_estimator: Literal["k1", "k3"] = Field("k1", description="estimator of the KL per token in the reward")
    gamma: Probability = Field(1.0, description="discount factor per token")
    lam: Probability = Field(1.0, description="lambda of the advantage estimation (GAE)")
    clip: Positive = Field(
        0.2, description="half-width of the interval around 1 to which the policy's ratio is clipped"
    )
    value_clip: Positive = Field(
        0.2, description="half-width of the interval around the old values to which new values are clipped"
    )
    value_coefficient: float = Field(0.1, ge=0, description="weight of the value loss")
    max_grad_norm: Positive = Field(1.0, description="gradients with a larger norm are scaled down to this norm")
    whiten_advantages: bool = Field(
        True, description="whether advantages get mean 0 and variance 1 over all tokens of a step"
    )
    stop_penalty: float = Field(-6.0, le=0, description="added to the reward of a response that did not end on its own")
    length_reward: float = Field(
        5.0,
        description="factor c of the length reward c * min(tokens / response_length * length bonus, length_reward_cap)",
    )
    length_reward_cap: float = Field(
        0.8, description="largest value of tokens / response_length * length bonus that is rewarded"
    )
    save_steps: Annotated[Count, FREE] = Field(10, description="number of PPO steps between two checkpoints")
    seed: Seed = Field(
        42, description="seed of the order of prompts, of sampling, principles, minibatches and new weights"
    )

    @model_validator(mode="after")
    def _room_and_whole_minibatches(self) -> Self:
        check_engine_temperature(self.engine, self.temperature)
        if self.reward_query_length + self.reward_response_length >= self.reward_max_length:
            raise in_field(
                "reward_max_length",
                f"{self.reward_max_length} leaves no room for the template next to {{section}}.reward_query_length "
                f"{self.reward_query_length} and {{section}}.reward_response_length {self.reward_response_length}",
            )
        if self.rollout_batch_size % self.minibatch_size:
            raise in_field(
                "rollout_batch_size",
                f"{self.rollout_batch_size} is not a multiple of {{section}}.minibatch_size {self.minibatch_size}",
            )
        return self


def is_local(path: str) -> bool:
    """Whether a path names a local file or folder: `name` and `owner/name` without a file ending are hub ids.

    A relative path with more parts, a leading dot, slash or tilde, or a data file's ending is local; so is
    anything that exists.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    return looks_local or path.endswith((".json", ".jsonl", ".gz", ".parquet")) or Path(path).exists()
