"""The settings of the workflow: one pydantic model for each section of `config.yaml`.

A section is validated when Snakemake starts (`configuration.load`) and again by the script that receives it, so a value
is wrong at the same place for the same reason whether it came from the file or from the command line.
What is set here changes what is computed; what only changes where and how fast (GPUs, tokens per pass, ZeRO
stage) is a resource of the profile and does not appear here. `config.schema.json` and docs/configuration.md are written
from these models (`make docs-reference`).
"""

import os
from collections.abc import Collection
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
"""What vLLM takes besides 0: it would raise a lower one by itself, and refuses a higher one."""


def check_engine_temperature(engine: Engine, temperature: float) -> None:
    """Refuse a temperature that an engine does not sample at."""
    low, high = VLLM_TEMPERATURES
    if engine == "vllm" and temperature and not low <= temperature <= high:
        raise in_field(
            "temperature", f"{temperature} with the engine vllm, which samples at 0, or from {low} to {high}"
        )


COLDEST = 0.001  # a lower temperature takes the most probable token anyway, and rounding decides what is learnt of it
# What transformers gives a chat template itself, or takes for an option.
_RESERVED_VARIABLES = frozenset(
    {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding"}
    | {"continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask"}
)


def _check_variables(variables: dict[str, Any]) -> dict[str, Any]:
    """Refuse names that a chat template cannot be given."""
    if wrong := sorted(name for name in variables if not name.isidentifier() or name in _RESERVED_VARIABLES):
        raise ValueError(f"{', '.join(wrong)} cannot be set; a variable has a name of letters that is not used already")
    return variables


TemplateVariables = Annotated[dict[str, str | int | float | bool | None], AfterValidator(_check_variables)]


@dataclass(frozen=True)
class OneOf:
    """Annotation of a string that has to be one of some registered names."""

    names: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check after the type."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Name them to editors."""
        return {**handler(schema), "enum": list(self.names)}

    def _check(self, name: str) -> str:
        if name not in self.names:
            raise ValueError(f"must be one of {', '.join(map(repr, self.names))}")
        return name


@dataclass(frozen=True)
class Free:
    """Annotation of a field that changes how the work is done, and nothing of what comes out (but by rounding).

    A change of it reruns no rule, starts no training anew and makes no artifact stale.
    """


FREE = Free()


class Section(BaseModel):
    """Base of all sections: unknown keys and values of another type are errors; nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def free(self) -> dict[str, Any]:
        """The fields marked `FREE`: name, or `section.name` of a section in this one -> value."""
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if FREE in field.metadata:
                found[name] = value
            elif isinstance(value, Section):
                found |= {f"{name}.{below}": item for below, item in value.free().items()}
        return found

    def deciding(self) -> dict[str, Any]:
        """The fields that decide what comes out, those that are not free, as JSON types."""
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
        """`true` where a number is wanted would silently become 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are not allowed here")
        return value

    @field_validator("*")
    @classmethod
    def _reject_what_overflows(cls, value: Any) -> Any:
        """Models compute in single precision, which a finite number may still leave."""
        if isinstance(value, int | float) and abs(value) > LARGEST:
            raise ValueError(f"no number here may be larger than {LARGEST:.0e}")
        return value


class Model(Section):
    """A base model, and the adapter that makes it the initial policy (paper section 3.1)."""

    base: str = Field(description="hub id or local folder of the base model")
    revision: str | None = Field(None, description="commit, tag or branch on the hub; a commit for a frozen run")
    adapter: str | None = Field(
        None,
        description="LoRA adapter of the initial policy, and its tokenizer if it has one: hub id, folder, `sft` (which "
        "`train_sft` makes) or null",
    )
    adapter_revision: str | None = Field(None, description="commit, tag or branch of the adapter")
    quantization: Literal["nf4", "none"] = Field("nf4", description="4-bit NormalFloat, double quantised, or none")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="number type of weights and computation"
    )
    attention: Annotated[Literal["sdpa", "eager", "flash_attention_2"], FREE] = Field(
        "sdpa", description="attention kernel; the judge takes sdpa where this is flash_attention_2"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    def without_adapter(self) -> Self:
        """The base model alone, which reward models are trained on."""
        return self.model_copy(update={"adapter": None, "adapter_revision": None})

    def with_adapter(self, folder: Path) -> Self:
        """The base model with the adapter in a folder."""
        return self.model_copy(update={"adapter": str(folder), "adapter_revision": None})

    @field_validator("base", "adapter")
    @classmethod
    def _in_full(cls, name: str | None) -> str | None:
        """`~/model` as a path that everybody understands."""
        return name and os.path.expanduser(name)


class Source(Section):
    """One public data set in its upstream schema."""

    format: str = Field(description="which upstream schema the rows have")
    path: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="hub id, local file or folder, or a list of them (parquet, jsonl, json, the last two also gzipped)"
    )
    split: str = Field("train", description="split on the hub; not used for local files")
    revision: str | None = Field(None, description="commit, tag or branch on the hub")
    data_files: str | None = Field(None, description="file inside the hub repository, where it has no split")
    limit: Count | None = Field(
        None,
        description="at most so many prompts (of openorca: per family), pairs or examples after cleaning, drawn with "
        "the seed",
    )
    max_bad_rows: int = Field(
        0, ge=0, description="so many rows that are not of the format are left out and counted; more are an error"
    )
    question_type: QuestionType = Field(
        "general", description="read for RL prompts only, where it decides which principles and length bonus apply"
    )

    @property
    def paths(self) -> list[str]:
        """The path or paths, as a list."""
        return [self.path] if isinstance(self.path, str) else self.path


class PromptSource(Source):
    """A data set that prompts are taken from."""

    format: Annotated[str, OneOf(PROMPT_FORMATS)] = Field(description="which upstream schema the rows have")


class PairSource(Source):
    """A data set of human preferences."""

    format: Annotated[str, OneOf(PAIR_FORMATS)] = Field(description="which upstream schema the rows have")


class JudgedPairSource(PairSource):
    """A data set of human preferences that the judge is held against."""

    principles: list[str] | None = Field(
        None, description="names of the principles that these preferences are about; null: each is tried"
    )


class ExampleSource(Source):
    """A data set of instructions with answers."""

    format: Annotated[str, OneOf(EXAMPLE_FORMATS)] = Field(description="which upstream schema the rows have")


class PathVars(Section):
    """Where things go: Snakemake's path variables."""

    results: str = Field("results", min_length=1, description="folder of all artifacts")
    logs: str = Field("results/logs", min_length=1, description="folder of the logs, one log per job")
    benchmarks: str = Field("results/benchmarks", min_length=1, description="folder of run times and memory, per job")

    @field_validator("*", mode="after")
    @classmethod
    def _plain(cls, path: str) -> str:
        if wrong := sorted({mark for mark in path if mark in "{}<>*?[]" or not mark.isprintable()}):
            raise ValueError(f"{' '.join(map(repr, wrong))} cannot be in these paths")
        return str(PurePosixPath(path))  # `results/` is `results`


class PolicyPrompt(Section):
    """How an instruction becomes the policy's prompt, and where its answer ends."""

    template: str = Field(
        description="preamble file that ends with the user's turn marker, or `chat` for the tokenizer's"
    )
    assistant_marker: str = Field("### Dromedary", description="begins the assistant's turn")
    template_variables: TemplateVariables = Field(
        {}, description="what the tokenizer's chat template is given besides, such as `{enable_thinking: false}`"
    )
    stop: list[Marker] = Field(["\n### User\n"], description="an answer ends before the first of these, or at EOS")
    thinking: tuple[Marker, Marker] | None = Field(
        ("<think>", "</think>"),
        description="markers that open and close thinking, which is cut out of answers before they are read; or null",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.template_variables and not self.is_chat:
            raise in_field("template_variables", "these are for a chat template; set {section}.template to `chat`")
        if self.thinking and self.thinking[0] == self.thinking[1]:
            raise in_field("thinking", "the markers have to differ")
        return self

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer's chat template makes the prompt."""
        return self.template == "chat"

    @property
    def files(self) -> list[str]:
        """The template's file, if it has one."""
        return [] if self.is_chat else [self.template]


class TaskPrompt(Section):
    """What of `policy_prompt` decides how lm-eval's tasks are asked."""

    template: Literal["chat"] | None = Field(None, description="`chat`: as turns of the tokenizer's chat template")
    template_variables: TemplateVariables = Field({}, description="what that template is given besides")
    thinking: tuple[Marker, Marker] | None = Field(None, description="markers that open and close thinking, or null")

    @classmethod
    def of(cls, prompt: PolicyPrompt, tasks_format: Literal["policy", "text", "chat"]) -> Self:
        """Of a run's policy, with `evaluation.tasks_format`."""
        is_chat = prompt.is_chat if tasks_format == "policy" else tasks_format == "chat"
        return cls(
            template="chat" if is_chat else None,
            template_variables=prompt.template_variables if is_chat else {},
            thinking=prompt.thinking,
        )


def _expanded(path: str | None) -> str | None:
    """`~/file` as a path that everybody understands."""
    return path and os.path.expanduser(path)


ReadyFile = Annotated[str, AfterValidator(_expanded)]


def _local(path: str) -> str:
    """A file of the authors' tables, which nobody fetches."""
    if not is_local(path):
        raise ValueError(f"{path} is no file here: fetch it, and name the file with its ending")
    return path


def _two_files(paths: tuple[str, str]) -> tuple[str, str]:
    """The files of both responses."""
    if Path(paths[0]).resolve() == Path(paths[1]).resolve():
        raise ValueError("the two responses are in different files")
    return paths


ReadyTable = Annotated[ReadyFile, AfterValidator(_local)]
ResponseFiles = Annotated[tuple[ReadyTable, ReadyTable], AfterValidator(_two_files)]


class Prompts(Section):
    """Prompts of the synthetic preferences."""

    sources: dict[str, PromptSource] = Field(min_length=1, description="name -> data set")
    seed: Seed = Field(42, description="seed of the draw where a source has a limit")


class RlPrompts(Prompts):
    """Prompts of the RL stage."""

    min_tokens: Tokens = Field(
        2,
        description="smallest number of tokens of an instruction, with its input and the beginning token; shorter ones "
        "are dropped",
    )
    max_tokens: Tokens = Field(
        256, description="largest number of tokens of an instruction, counted alike; longer ones are dropped"
    )
    length_bonus: dict[QuestionType, Number] = Field(
        {"general": 1.0, "reasoning": -0.4, "red_teaming": 0.0},
        description="factor of the length reward by question type",
    )

    @field_validator("length_bonus")
    @classmethod
    def _complete(cls, factors: dict[QuestionType, float]) -> dict[QuestionType, float]:
        # Of all types, since rows of a source may have their own.
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
        description="response0 and response1 that are there already, two response files of the authors' release; null "
        "samples them. The first is output 1 of the judging",
    )
    engine: Engine = Field(
        "transformers",
        description="what samples both responses: `transformers`, our own loop, which is the reference; or `vllm`, "
        "which is installed apart (docs/engines.md) and draws other tokens",
    )
    seeds: tuple[Seed, Seed] = Field((42, 43), description="seeds of response0 and response1")
    temperature: float = Field(0.7, ge=0, le=1000, description="sampling temperature; 0 takes the most probable token")
    top_p: float = Field(
        1.0, gt=0, le=1, description="probability that the tokens drawn from reach together, the most probable first"
    )
    max_length: Tokens = Field(
        768,
        description="largest number of tokens of prompt and response together, counted from after the preamble, which "
        "all prompts begin with",
    )
    shards: Annotated[Shards, FREE] = Field(
        4, description="number of jobs that each table of responses is scattered over"
    )

    @model_validator(mode="after")
    def _engine_samples_at_it(self) -> Self:
        check_engine_temperature(self.engine, self.temperature)
        return self

    @field_validator("temperature")
    @classmethod
    def _not_nearly_zero(cls, temperature: float) -> float:
        if 0 < temperature < COLDEST:
            raise ValueError(f"a temperature below {COLDEST} is as good as 0; set it to 0")
        return temperature

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, int]) -> tuple[int, int]:
        if seeds[0] == seeds[1]:
            raise ValueError("the two responses need different seeds")
        return seeds


class Scored(Section):
    """How a model that scores reads its template."""

    format: Literal["text", "chat"] = Field(
        "text", description="`text`: the file as it is; `chat`: its parts as turns of the tokenizer's chat template"
    )
    template_variables: TemplateVariables = Field(
        {}, description="what the chat template is given besides, such as `{enable_thinking: false}`"
    )

    @model_validator(mode="after")
    def _variables_fit(self) -> Self:
        if self.template_variables and self.format != "chat":
            raise in_field("template_variables", "these are for a chat template; set {section}.format to `chat`")
        return self


class Scoring(Scored):
    """How the reward model reads its texts, in pre-training, training and RL alike."""


class Judge(Scored):
    """The judge of the responses: the initial policy (paper section 3.2), or another model."""

    path: ReadyTable | None = Field(
        None,
        description="judgements that are there already, a preference file of the authors' release about the responses "
        "in sampling.paths; null judges them",
    )
    model: Model | None = Field(None, description="null: the initial policy judges, as in the paper; else a section")
    template: str = Field(
        description="template file with {UserInstruction} {OutputA} {OutputB} {Dimension} {Definition}"
    )
    principles: str = Field(description="JSON file: a list of dimension, definition, negative_definition")
    max_length: Tokens = Field(
        1536, description="largest number of tokens of a prompt; longer ones are shortened in the responses"
    )
    min_characters: int = Field(
        16,
        ge=0,
        description="smallest number of characters of a response; pairs with a shorter one are dropped, but for those "
        "that something is measured by",
    )
    turn_markers: list[Marker] = Field(["\n### User\n"], description="responses are cut at the first of these")
    shards: Annotated[Shards, FREE] = Field(8, description="number of jobs that the judging is scattered over")


class Aggregation(Section):
    """Judgements to reward-model records (paper section 3.2, reference step 2)."""

    path: ReadyTable | None = Field(
        None,
        description="records that are there already, a file of the authors' release with principles that "
        "judge.principles defines; null makes them of the judgements",
    )
    dimensions: list[str] = Field(min_length=1, description="names of the judged principles that are used")
    passes: Count = Field(4, le=1000, description="number of records drawn per pair, at most")
    geometric_p: float = Field(
        0.2,
        gt=0,
        le=1,
        description="parameter of the geometric distribution that the number of principles shown is drawn from",
    )
    max_principles: Count = Field(8, description="largest number of principles shown; a larger one is drawn again")
    negation_probability: Probability = Field(0.5, description="probability with which a principle shown is negated")
    agreement: Literal["both_orders", "mean"] = Field(
        "both_orders",
        description="`both_orders`: a principle prefers neither output where the judge's two orders disagree, as in "
        "the paper; `mean`: the mean of both orders counts, in which a judge's liking for a position cancels out",
    )
    decision: Literal["dominant", "sum"] = Field(
        "dominant", description="what decides a pair: the largest |score| of the principles shown, or the sum of all"
    )
    refusal_phrase: str = Field(
        "As an AI language model",
        description="text of a refusal; where exactly one output has it, the other one may win by rule",
    )
    refusal_probability: Probability = Field(0.5, description="probability with which the refusal rule applies")
    language_rule: bool = Field(True, description="whether an output in another language than the instruction loses")
    label_noise: Probability = Field(0.1, description="probability that a label is flipped")
    rule_label_noise: Probability = Field(0.25, description="probability that a label is flipped where a rule decided")
    seed: Seed = Field(42, description="seed of all draws of the aggregation")

    @field_validator("dimensions")
    @classmethod
    def _once(cls, dimensions: list[str]) -> list[str]:
        if twice := sorted({name for name in dimensions if dimensions.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} named twice")
        return dimensions


class PmpData(Section):
    """Public human preferences for pre-training the reward model."""

    sources: dict[str, PairSource] = Field(min_length=1, description="name -> data set")
    min_score_ratio: float = Field(2.0, ge=1, description="pairs that have a score ratio (SHP) need a larger one")
    seed: Seed = Field(42, description="seed of the order of outputs and records, and of the draw under a limit")


class SftData(Section):
    """Instructions with answers, which the initial policy is trained on where `model.adapter` is `sft`."""

    sources: dict[str, ExampleSource] = Field(min_length=1, description="name -> data set")
    seed: Seed = Field(42, description="seed of the draw where a source has a limit")


class Lora(Section):
    """Adapters of all trained models (QLoRA); their weights are float32, in the paper's RL bfloat16."""

    r: Count = Field(64, le=16384, description="rank of the adapters")
    alpha: Positive = Field(16.0, description="numerator of the scale alpha / r of the adapters' outputs")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="dropout of the adapters' inputs while a reward model or the initial policy is trained",
    )


class Training(Section):
    """The training of an adapter, by gradient descent on examples."""

    learning_rate: Rate = Field(description="peak learning rate, after linear warm-up and before half a cosine to 0")
    epochs: Positive = Field(1.0, le=1000, description="number of passes over the records; need not be whole")
    batch_size: Count = Field(64, description="pairs per step, over all GPUs")
    max_length: Tokens = Field(description="largest number of tokens of the whole text")
    warmup_ratio: Probability = Field(0.03, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    max_grad_norm: Positive = Field(0.3, description="gradients of a larger norm are scaled down to it")
    eval_examples: int = Field(500, ge=0, description="number of records held out, whole prompts at a time")
    save_steps: Annotated[Count, FREE] = Field(50, description="number of steps between two checkpoints")
    seed: Seed = Field(42, description="seed of the split, the order of the records and the fresh weights")


class Sft(Training):
    """Supervised fine-tuning of the base model on answers, which makes the initial policy."""

    batch_size: Count = Field(128, description="examples per step, over all GPUs")
    max_length: Tokens = Field(
        1024,
        description="largest number of tokens of prompt and answer; a longer answer is cut, and its end is not learnt",
    )
    eval_examples: int = Field(
        500, ge=0, description="number of examples held out for the loss in metrics.json, whole prompts at a time"
    )


class RewardTraining(Training):
    """One stage of reward-model training."""

    template: str = Field(description="template file with {Output} {Input} and, for principles, {Dimensions}")
    query_length: Tokens = Field(description="largest number of tokens of the instruction, which is cut on its left")
    response_length: Tokens = Field(description="largest number of tokens of the response, which is cut on its right")
    eval_examples: int = Field(
        500,
        ge=0,
        description="number of pairs held out for evaluation, whole prompts at a time; the paper trains on all, as 0 "
        "does, and evaluates on 500 human preferences of another data set",
    )

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.query_length + self.response_length >= self.max_length:
            raise in_field(
                "max_length",
                f"{self.max_length} leaves no room for the template besides {{section}}.query_length "
                f"{self.query_length} and {{section}}.response_length {self.response_length}",
            )
        return self


class RewardModel(RewardTraining):
    """Principle-following stage."""

    path: ReadyFile | None = Field(
        None,
        description="reward model that is there already, hub id or folder, in our layout or in that of the authors' "
        "release; null trains one",
    )
    revision: str | None = Field(None, description="commit, tag or branch of that reward model on the hub")
    init: Literal["pmp", "base"] = Field(
        "pmp", description="what training starts from: the pre-trained reward model, or the base model"
    )


class JudgeEndpoint(Section):
    """A model behind an OpenAI-compatible endpoint that compares each policy's answers with the initial policy's."""

    url: Annotated[str, FREE] = Field(
        description="of the API, such as `http://localhost:8000/v1`; `/chat/completions` is put behind it"
    )
    model: str = Field(min_length=1, description="name of the model, as the endpoint knows it")
    key_variable: Annotated[str | None, FREE] = Field(
        None,
        pattern=r"^[A-Za-z_]\w*$",
        description="name of the environment variable that holds the key, if it has one",
    )
    template: str = Field(
        "prompts/templates/endpoint.txt", description="template file with {UserInstruction} {OutputA} {OutputB}"
    )
    options: dict[str, str | int | float | bool] = Field(
        {"temperature": 0, "max_tokens": 1024}, description="what a request holds besides model and messages"
    )
    max_requests: Annotated[Count, FREE] = Field(8, le=1000, description="requests at once, at most")
    timeout: Annotated[Positive, FREE] = Field(120.0, description="seconds until a request counts as failed")
    retries: Annotated[int, FREE] = Field(
        8, ge=0, le=1000, description="number of times that a request that failed for a while is sent again"
    )
    max_refused: Annotated[Probability, FREE] = Field(
        0.1, description="share of comparisons that the endpoint may refuse, such as by a filter; more are an error"
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
            raise ValueError("must be an address that begins with http:// or https://")
        if parts.username or parts.password or parts.query or parts.fragment:
            # Not shown, as it may be a key.
            raise PydanticCustomError("address", "must hold no name, key or query: a key belongs into key_variable")
        return url.rstrip("/")


class Evaluation(Section):
    """What is measured of judge, reward models and policies, beside their training."""

    prompts: dict[str, PromptSource] = Field(
        {}, description="name -> prompts that policies answer; those that were trained on are left out"
    )
    engine: Engine = Field(
        "transformers",
        description="what samples the answers to evaluation.prompts and MT-Bench, as `sampling.engine`",
    )
    against: str | None = Field(
        None,
        description="name of a run, such as a control run, with whose answers the judge compares those of all others, "
        "besides those of their initial policy; null for none",
    )
    pairs: dict[str, PairSource] = Field(
        {},
        description="name -> preferences of people that reward models are held against; those about queries that PMP "
        "trains on are left out",
    )
    judge_pairs: dict[str, JudgedPairSource] = Field(
        {}, description="name -> preferences of people that the judge is held against, under each principle"
    )
    min_score_ratio: float = Field(2.0, ge=1, description="pairs that have a score ratio (SHP) need a larger one")
    seed: Seed = Field(42, description="seed of the order of outputs, the draw under a limit, and the intervals")
    tasks: list[Marker] = Field(
        [], description="tasks of lm-eval, and of `evaluation_tasks`, that every policy and the initial one are asked"
    )
    tasks_limit: Count | None = Field(None, description="at most so many questions of a task, the first ones")
    tasks_format: Literal["policy", "text", "chat"] = Field(
        "policy",
        description="`text`: questions as documents, which the model continues; `chat`: as turns of the tokenizer's "
        "chat template; `policy`: as turns where policy_prompt.template is `chat`",
    )
    tasks_data: dict[str, ReadyFile] = Field(
        {}, description="data of tasks that are at hand: `hhh`, a folder, and `truthfulqa`, a file (docs/evaluation.md)"
    )
    tasks_folder: ReadyFile | None = Field(
        None, description="folder of more tasks in lm-eval's YAML, which may run Python code that is beside it"
    )
    mt_bench: ReadyFile | None = Field(
        None, description="FastChat's file of questions, which every policy and the initial one answer; null for none"
    )
    mt_bench_tokens: Tokens = Field(1024, description="largest number of tokens of an answer to MT-Bench")
    judge_endpoint: JudgeEndpoint | None = Field(
        None, description="null, or a section: who compares the policies' answers to evaluation.prompts and MT-Bench"
    )


class Report(Section):
    """What the report shows."""

    samples: bool = Field(
        False,
        description="whether it shows answers to prompts of public data sets, too, some of which are offensive; "
        "answers to one's own prompts (local files of format `prompts`) and to the demo's are shown in any case",
    )


class PpoTexts(Section):
    """What of RL has to do with the model, and is checked with it: how long its texts are, and how they look."""

    template: str = Field(
        description="template file of the reward model's text in RL: {Output} {Input} {Dimensions}, and fixed lines"
    )
    query_length: Tokens = Field(
        256,
        description="largest number of tokens of a whole prompt: preamble, instruction and markers; longer ones are "
        "left out",
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

    principles: str = Field(description="JSON file: a list of dimension, definition, weight")
    principles_per_rollout: int = Field(
        3,
        ge=0,
        description="number of principles shown, drawn by weight without replacement; 0 shows none, as a control run",
    )
    boost: float = Field(128.0, ge=0, description="added to the weight of principles that fit the question type")
    boosted_words: dict[QuestionType, list[Marker]] = Field(
        {"reasoning": ["reason", "numerical"], "red_teaming": ["ethical", "harmless"]},
        description="words in a principle's name that fit a question type",
    )
    learning_rate: Rate = Field(2e-5, description="peak learning rate of policy and value model")
    warmup_steps: int = Field(5, ge=0, description="PPO steps of linear warm-up from a rate of 0, before a cosine to 0")
    epochs: Count = Field(2, le=100_000, description="number of passes over the prompts")
    max_steps: Count | None = Field(None, description="largest number of PPO steps, where the epochs have more")
    rollout_batch_size: Count = Field(576, description="rollouts per PPO step, over all GPUs")
    minibatch_size: Count = Field(288, description="rollouts per optimiser step, over all GPUs")
    inner_epochs: Count = Field(2, le=100_000, description="number of passes over the rollouts of a step")
    temperature: float = Field(
        0.7, ge=COLDEST, le=1000, description="sampling temperature; PPO improves the policy at this temperature"
    )
    engine: Engine = Field(
        "transformers",
        description="what samples rollouts: `transformers`, our own loop, which is the reference; or `vllm`, which is "
        "installed apart (docs/engines.md) and draws other tokens",
    )
    rollout_correction: Literal["truncated", "none"] = Field(
        "truncated",
        description="with an engine, `truncated`: each token's loss is weighted by pi_trainer / pi_engine, at most "
        "rollout_correction_cap (truncated importance sampling); `none`: not at all",
    )
    rollout_correction_cap: float = Field(2.0, ge=1, description="largest weight of a token's loss")
    cut_markers: list[Marker] = Field(
        ["\nNote", "\nUpdate", "\nComment"],
        description="a response is cut before the first of these, and counts as one that did not end by itself: such "
        "lines praise or amend the response",
    )
    kl_coefficient: float = Field(
        0.01, ge=0, description="coefficient of the KL penalty in the reward, the same at every step"
    )
    kl_estimator: Literal["k1", "k3"] = Field("k1", description="estimator of the KL per token in the reward")
    gamma: Probability = Field(1.0, description="discount factor per token")
    lam: Probability = Field(1.0, description="lambda of the advantage estimation (GAE)")
    clip: Positive = Field(0.2, description="half width of the interval around 1 that the policy's ratio is clipped to")
    value_clip: Positive = Field(
        0.2, description="half width of the interval around the old values that new ones are clipped to"
    )
    value_coefficient: float = Field(0.1, ge=0, description="weight of the value loss")
    max_grad_norm: Positive = Field(1.0, description="gradients of a larger norm are scaled down to it")
    whiten_advantages: bool = Field(
        True, description="whether advantages get mean 0 and variance 1 over all tokens of a step"
    )
    stop_penalty: float = Field(-6.0, le=0, description="added to the reward of a response that did not end by itself")
    length_reward: float = Field(
        5.0,
        description="factor c of the length reward c * min(tokens / response_length * length bonus, length_reward_cap)",
    )
    length_reward_cap: float = Field(
        0.8, description="largest value of tokens / response_length * length bonus that is rewarded"
    )
    save_steps: Annotated[Count, FREE] = Field(10, description="number of PPO steps between two checkpoints")
    seed: Seed = Field(
        42, description="seed of the order of prompts, sampling, principles, minibatches and fresh weights"
    )

    @model_validator(mode="after")
    def _room_and_whole_minibatches(self) -> Self:
        check_engine_temperature(self.engine, self.temperature)
        if self.reward_query_length + self.reward_response_length >= self.reward_max_length:
            raise in_field(
                "reward_max_length",
                f"{self.reward_max_length} leaves no room for the template besides {{section}}.reward_query_length "
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
