"""How a reward model of the demo understands your own sentences: how its scores correlate with each oracle.

Answers of mixed qualities to held-out instructions are scored under each sentence alone. A sentence that is understood
has a correlation near 1 with the oracle that it is about, and near 0 with the others.
"""

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow_scripts")]

from demo import evaluate_demo, oracles, world  # noqa: E402
from salmon import configuration, encoding, models, pages, randomness, reward_model, script  # noqa: E402
from salmon.tokenizers import load_tokenizer  # noqa: E402

SENTENCES = [
    "The output is short and uses few words.",  # as the reward model was trained on it
    "The output asks questions.",
    "The output insults the reader.",
    "The output has images and asks questions.",
    "The output is polite.",
    "The output is short and polite.",
]


class Arguments(script.Arguments):
    """How a reward model of the demo scores answers under your own sentences, compared with the demo's oracles."""

    sentences: script.JsonList[str] = Field(SENTENCES, min_length=1, description="JSON list of principles")
    results: Path = Field(Path("results/demo"), description="folder of the demo's results")
    answers: int = Field(200, ge=2, description="answers that are scored")
    seed: int = Field(0, description="seed of the answers")
    threads: int = Field(2, ge=1, description="CPU threads")


def main(arguments: Arguments) -> None:
    """Write answers, score them under each sentence, print a table."""
    torch.set_num_threads(arguments.threads)
    rng = randomness.rng("own principle", arguments.seed)
    instructions = evaluate_demo.draw_instructions(arguments.answers, "held_out", arguments.seed)
    answers = [world.write_answer(each, world.draw_qualities(rng), rng) for each in instructions]
    texts = [each.text for each in instructions]
    marks = [list(oracles.score(text, answer).values()) for text, answer in zip(texts, answers, strict=True)]
    found = correlations(scores(arguments, texts, answers), np.array(marks))
    rows = [[name, *(f"{value:.2f}" for value in row)] for name, row in zip(arguments.sentences, found, strict=True)]
    sys.stdout.write(
        pages.markdown(pages.Table("Correlation of scores and oracles", ["sentence", *oracles.ORACLES], rows))
    )


def scores(arguments: Arguments, instructions: list[str], answers: list[str]) -> npt.NDArray[np.float64]:
    """Rewards of the answers, shape [sentences, answers]."""
    config = configuration.Config.model_validate(
        configuration.read([ROOT / "config.yaml", ROOT / "demo" / "config.yaml"])
    )
    model = config.model.model_copy(update={"base": str(ROOT / config.model.base)})
    settings, device = config.reward_model, torch.device("cpu")
    tokenizer = load_tokenizer(model)
    template = encoding.read_template(tokenizer, str(ROOT / settings.template), config.scoring, "scoring.format")
    reader = models.load_reward_model(model, arguments.results / "models" / "reward_model", device, trainable=False)
    rows = []
    for sentence in arguments.sentences:
        tokens = reward_model.reward_text_tokens(
            tokenizer,
            template,
            instructions,
            answers,
            [[sentence]] * len(answers),
            query_length=settings.query_length,
            response_length=settings.response_length,
            max_length=settings.max_length,
            keys="reward_model.",
        )
        rows.append(reward_model.score(reader, tokens, evaluate_demo.BATCH, device).double().numpy())
    return np.stack(rows)


def correlations(rewards: npt.NDArray[np.float64], marks: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Pearson's, of each row of rewards [sentences, answers] with each column of marks [answers, oracles]."""
    both = np.corrcoef(rewards, marks.T)
    found: npt.NDArray[np.float64] = both[: len(rewards), len(rewards) :]
    return found


if __name__ == "__main__":
    script.run(main, Arguments)
