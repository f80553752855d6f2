"""The tasks' data: local files where `evaluation.tasks_data` names some, else the hub's.

lm-eval calls these functions with the metadata that it was started with: on its own command line `--metadata
'{"hhh": "FOLDER", "truthfulqa": "FILE"}'`.
"""

import gzip
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

HHH = "HuggingFaceH4/hhh_alignment"
PARQUET = "refs/convert/parquet"  # the hub's own conversion: the data set itself is a script, which is no longer run


def hhh(part: str, hhh: str | None = None, **_: Any) -> DatasetDict:
    """One part of the Helpful, Honest and Harmless evaluation (Askell et al., arXiv 2112.00861).

    Args:
        part: `helpful`, `honest`, `harmless` or `other`.
        hhh: folder with `PART/task.json`, which may be gzipped, as BIG-bench has them; null for the hub's.

    Returns:
        Split `test` with `input` and `targets`: `choices` and `labels`, 1 for the right one.
    """
    if hhh is None:
        return load_dataset(HHH, data_files={"test": f"{part}/test/*.parquet"}, revision=PARQUET)
    rows = _read(Path(hhh) / part / "task.json")["examples"]
    test = [{"input": row["input"], "targets": _choices(row["target_scores"])} for row in rows]
    return DatasetDict({"test": Dataset.from_list(test)})


def truthfulqa(truthfulqa: str | None = None, **_: Any) -> DatasetDict:
    """TruthfulQA's multiple choice from a local file, `mc_task.json` of its authors, which may be gzipped.

    Returns:
        Split `validation` with the columns that the hub's `truthfulqa/truthful_qa` has.

    Raises:
        ValueError: where no file is named.
    """
    if truthfulqa is None:
        raise ValueError("truthfulqa_local reads a local file: name it in evaluation.tasks_data.truthfulqa")
    targets = ("mc1_targets", "mc2_targets")
    rows = [
        {"question": row["question"], **{name: _choices(row[name]) for name in targets}}
        for row in _read(Path(truthfulqa))
    ]
    return DatasetDict({"validation": Dataset.from_list(rows)})


def _choices(scores: dict[str, int]) -> dict[str, list[Any]]:
    """Answers with their scores, as the hub's data sets have them."""
    return {"choices": list(scores), "labels": list(scores.values())}


def _read(path: Path) -> Any:
    """A JSON file, gzipped or not."""
    path = path if path.exists() else path.with_name(f"{path.name}.gz")
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as stream:
        return json.load(stream)
