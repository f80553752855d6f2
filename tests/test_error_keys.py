"""Errors in training name the keys that the user has set, in the section that is at fault."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import train_reward_model
from salmon.config import RewardTraining
from salmon.configuration import Config
from salmon.errors import UserError
from salmon.tables import PREFERENCE_RECORDS
from tests.keys import is_key
from tests.ppo_world import World, run

TEMPLATE = "# Review\n{Output}\n# For\n{Input}\nThe quality of the output is\n"


def keys(message: str) -> set[str]:
    """Names with a section in front."""
    return set(re.findall(rf"\b(?:{'|'.join(Config.model_fields)})\.[a-z_.]*[a-z]\b", message))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def options(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """Options for training without principles, which either stage accepts."""
    import polars as pl

    rows = [
        {
            **{"record_id": f"{row:02}", "prompt_id": f"{row:02}", "instruction": "Why?", "input": ""},
            **{"output_1": "one", "output_2": "two", "preference": 1 + row % 2},
            **{"definitions": [], "dimensions": [], "negated": [], "deciding": None},
        }
        for row in range(24)
    ]
    pl.DataFrame(rows, schema=PREFERENCE_RECORDS.schema).write_parquet(tmp_path / "records.parquet")
    (tmp_path / "review.txt").write_text(TEMPLATE)
    return {
        "records": tmp_path / "records.parquet",
        "output": tmp_path / "rm",
        "model": {"base": str(tiny_model), "quantization": "none", "dtype": "float32"},
        "lora": {"r": 4},
    }


def settings(template: Path) -> dict[str, Any]:
    lengths = {"max_length": 100, "query_length": 20, "response_length": 20}
    return {"template": str(template), "learning_rate": 1e-3, "batch_size": 8, "eval_examples": 4, **lengths}


@pytest.mark.parametrize("stage", ["pmp", "reward_model"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 22}, {"batch_size", "eval_examples", "epochs"}),
        ({"eval_examples": 30}, {"batch_size", "eval_examples", "epochs"}),
        ({"max_length": 5000}, {"max_length"}),
        ({"max_length": 5, "query_length": 2, "response_length": 2}, {"max_length", "query_length"}),
        ({"template": "bare.txt"}, {"template"}),
    ],
    ids=["few records", "many held out", "short context", "long text", "template"],
)
def test_of_reward_models(
    options: dict[str, Any], tmp_path: Path, stage: str, changes: dict[str, Any], named: set[str]
) -> None:
    (tmp_path / "bare.txt").write_text("{Output}\n")
    template = tmp_path / changes.get("template", "review.txt")
    arguments = options | {stage: {**settings(template), **changes, "template": str(template)}}
    with pytest.raises(UserError) as error:
        train_reward_model.main(train_reward_model.Arguments(**arguments))
    assert keys(str(error.value)) == {f"{stage}.{name}" for name in named}
    assert all(map(is_key, keys(str(error.value))))
    assert named <= set(RewardTraining.model_fields)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"minibatch_size": 3}, {"rollout_batch_size", "minibatch_size"}),
        ({"rollout_batch_size": 60, "minibatch_size": 60}, {"rollout_batch_size"}),
        ({"response_length": 4096}, {"query_length", "response_length"}),
        ({"reward_max_length": 4097}, {"reward_max_length"}),
        (
            {"reward_max_length": 10, "reward_query_length": 2, "reward_response_length": 2},
            {"reward_max_length", "reward_query_length"},
        ),
        (
            {"reward_max_length": 10, "reward_query_length": 8, "reward_response_length": 2},
            {"reward_max_length", "reward_query_length", "reward_response_length"},
        ),
        ({"principles_per_rollout": 6}, {"principles_per_rollout"}),
    ],
    ids=["batches", "few prompts", "short context", "short context of rewards", "long text", "no room", "principles"],
)
def test_of_ppo(world: World, tmp_path: Path, changes: dict[str, Any], named: set[str]) -> None:
    status, log = run(world.arguments(tmp_path / "policy", **changes))
    assert status != 0
    (message,) = re.findall(r"ERROR (.*(?:\n  .*)*)", log)
    assert keys(message) == {f"ppo.{name}" for name in named}, json.dumps(message)
    assert all(map(is_key, keys(message)))
