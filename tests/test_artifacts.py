"""Folders of work under way."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from salmon.artifacts import WorkFolder


def test_jobs_that_start_and_end_together(tmp_path: Path) -> None:
    """Their work folders stand in one folder, which the last of them deletes, and the next makes again."""

    def work(job: int) -> None:
        for _ in range(300):
            folder = WorkFolder(tmp_path / f"{job}.parquet")
            folder.open("mark")
            assert (folder.path / "fingerprint").read_text() == "mark"
            folder.delete()

    with ThreadPoolExecutor(8) as jobs:
        list(jobs.map(work, range(8)))
    assert not list(tmp_path.iterdir())
