"""Train the initial policy on instructions with answers: supervised fine-tuning (SFT) of the base model, QLoRA.

The loss is over answers and their ends; see `salmon/sft.py`. It runs and resumes like the training of a reward model.
The adapter is an ordinary PEFT folder, which `model.adapter` can name.
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import polars as pl
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from salmon import checked, distributed, models, provenance, script, sft, training
from salmon.config import Model, PolicyPrompt, Sft
from salmon.generation import end_tokens
from salmon.tables import SFT_EXAMPLES
from salmon.text import cut_at_markers, join_instruction
from salmon.tokenizers import load_tokenizer
from salmon.work import WorkFolder

log = logging.getLogger("salmon.train_sft")


class Arguments(training.Arguments):
    """Train the initial policy on instructions with answers."""

    examples: Path = Field(description="Parquet table of SFT examples")
    output: Path = Field(description="folder of the initial policy: adapter, metrics.json, manifest.json")
    model: Model = Field(description="section of the configuration; its adapter is not used")
    policy_prompt: PolicyPrompt = Field(description="section of the configuration")
    sft: Sft = Field(description="section of the configuration")

    @property
    def stage(self) -> str:
        """Name of the stage's section in the configuration."""
        return "sft"

    @property
    def settings(self) -> Sft:
        """The stage's section."""
        return self.sft


def main(arguments: Arguments) -> None:
    """Read and split the examples, train, evaluate, write the folder."""
    device = training.start(arguments)
    settings, base = arguments.sft, arguments.model.without_adapter()
    tokenizer = load_tokenizer(base)
    rows, examples, counts = read_examples(arguments, tokenizer)
    left_out = describe_left_out(counts, settings.max_length)
    if left_out:
        log.warning("%s", left_out)
    train, held = (
        [examples[place] for place in part["place"]]
        for part in training.split(rows, settings.eval_examples, settings.seed, sft.NAME)
    )
    lengths = [len(example.tokens) for example in train]
    order = training.training_order(len(train), settings.batch_size, settings.epochs, settings.seed, sft.NAME)
    counts |= training.count_rows(order, len(train), len(held), arguments, arguments.examples, left_out)
    counts["tokens"] = sum(lengths[index] for index in order)
    counts["answer_tokens"] = sum(lengths[index] - train[index].prompt for index in order)

    layout = order, lengths, settings.batch_size, arguments.tokens_per_pass, distributed.world()
    passes = training.passes_per_step(*layout)
    work = WorkFolder(arguments.output)
    trainer_arguments = training.trainer_arguments(arguments, work.path, counts["steps"], passes, device)
    origin = provenance.train_sft(
        arguments.examples, model=base, lora=arguments.lora, policy_prompt=arguments.policy_prompt, sft=settings
    )
    inputs = distributed.broadcast(origin.identify() if distributed.is_main() else None)
    if training.open_work(arguments, work, origin.fingerprint(inputs)):
        distributed.leave()
        return
    model = training.trainable_in_float32(models.new_policy(base, arguments.lora, device, settings.seed))
    models.check_context(model, settings.max_length, "sft.max_length")
    training.choose_recomputation(arguments, trainer_arguments, model, settings.max_length, device, logits=True)
    end = sft.frame(tokenizer, arguments.policy_prompt).end
    sft.check_end(tokenizer, arguments.policy_prompt, end, end_tokens(model.get_base_model(), tokenizer))

    def batch(indices: list[int]) -> training.Batch:
        return sft.collate([train[index] for index in indices])

    log.info("%s", ", ".join(f"{name} {number}" for name, number in counts.items()))
    micro_batches = training.micro_batches(*layout, passes)
    trainer = training.train(model, trainer_arguments, micro_batches, batch, sft.batch_loss, stage="sft", work=work)
    at_once = max(1, arguments.tokens_per_pass // settings.max_length)
    score = partial(sft.score, trainer.model, batch_size=at_once, device=device)
    evaluation = sft.evaluate(lambda: distributed.over_ranks(held, score) if held else score([]), trainer.model)
    training.write(trainer, work, origin.manifest(inputs, counts), evaluation)


def read_examples(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[pl.DataFrame, list[sft.Example], dict[str, int]]:
    """The usable training examples.

    Returns:
        Their `prompt_id` and `place` in the list that follows; that list; and the counts.
    """
    columns = ("example_id", "prompt_id", "instruction", "input", "output", "is_whole")
    table = checked.read(arguments.examples, SFT_EXAMPLES, columns).sort("example_id").collect()
    texts = (
        (join_instruction(instruction, extra), output, is_whole)
        for *_, instruction, extra, output, is_whole in script.progress(
            table.iter_rows(), total=len(table), what="examples encoded"
        )
    )
    found = sft.encode(tokenizer, texts, arguments.policy_prompt, arguments.sft.max_length)
    examples = [example for example in found if example]
    usable = pl.Series([example is not None for example in found], dtype=pl.Boolean)
    rows = table.select("prompt_id").filter(usable).with_row_index("place")
    stop = arguments.policy_prompt.stop
    no_answer = sum(not cut_at_markers(output, stop).strip() for output in table["output"])
    counts = {
        "examples": len(table),
        "no_answer": no_answer,
        "no_room_for_an_answer": len(table) - len(examples) - no_answer,
        "without_an_end": len(table) - int(table["is_whole"].sum()),
        "answers_cut": sum(example.is_cut for example in examples),
    }
    return rows, examples, counts


def describe_left_out(counts: Mapping[str, int], max_length: int) -> str:
    """The numbers of omitted examples, by reason; empty if there are none."""
    found = {
        f"leave no room for an answer in sft.max_length {max_length}: raise it": counts["no_room_for_an_answer"],
        "have no answer before a string of policy_prompt.stop": counts["no_answer"],
    }
    return "; ".join(f"{number} examples {what}" for what, number in found.items() if number)


if __name__ == "__main__":
    script.run(main, Arguments)
