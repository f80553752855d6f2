"""Break the algorithm on purpose, one piece at a time, in a copy of the repository: every breakage must fail a test.

`make breakages` runs it. It is not part of `make test`: it tests the tests.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "workflow_scripts/salmon"


@dataclass(frozen=True, slots=True)
class Breakage:
    """A piece of text in a library file, its broken form, and the tests that should notice it."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


BREAKAGES = (
    Breakage(
        "the KL penalty has the other sign",
        "ppo_math.py",
        "-kl_coefficient * kl.float()",
        "kl_coefficient * kl.float()",
        ("tests/test_ppo_math.py",),
    ),
    Breakage(
        "the mask of a response ends one token early",
        "ppo_math.py",
        "last = mask.sum(-1).long() - 1",
        "last = (mask.sum(-1).long() - 2).clamp(min=0)",
        ("tests/test_ppo_math.py",),
    ),
    Breakage(
        "the value model starts from a random head",
        "shared_base.py",
        "self.value_head = nn.Parameter(head.clone())",
        "self.value_head = nn.Parameter(torch.randn_like(head))",
        ("tests/test_shared_base.py",),
    ),
    Breakage(
        "negation is ignored: the plain definition is shown",
        "aggregation.py",
        "principles[index].negative_definition if turned else",
        "principles[index].definition if turned else",
        ("tests/test_aggregation.py",),
    ),
    Breakage(
        "the judge's second order has the sign of the first",
        "judging.py",
        "[-margin for margin in ba]",
        "list(ba)",
        ("tests/test_judging.py",),
    ),
    Breakage(
        "the reference is scored with the policy's adapter",
        "shared_base.py",
        'if role == "reference" and not self.has_reference_adapter:',
        "if False:",
        ("tests/test_shared_base.py",),
    ),
    Breakage(
        "the Bradley-Terry loss prefers the rejected output",
        "reward_model.py",
        "-nn.functional.logsigmoid(chosen.float() - rejected.float())",
        "-nn.functional.logsigmoid(rejected.float() - chosen.float())",
        ("tests/test_reward_model.py",),
    ),
    Breakage(
        "rewards of texts that are computed separately change places",
        "models.py",
        "rewards[torch.cat(parts).argsort()]",
        "rewards",
        ("tests/test_reward_model.py",),
    ),
)


def caught(breakage: Breakage) -> str:
    """The first test that fails with the breakage in place and passes without it; empty if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "results", ".snakemake", "*cache*"))
        file = copy / LIBRARY / breakage.file
        text = file.read_text(encoding="utf-8")
        if text.count(breakage.right) != 1:
            raise ValueError(f"{file.name} has {text.count(breakage.right)} times: {breakage.right}")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        file.write_text(text.replace(breakage.right, breakage.wrong), encoding="utf-8")
        done = subprocess.run([*command, *breakage.tests], cwd=copy, capture_output=True, text=True, check=False)
        failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
        if not failed:
            return ""
        file.write_text(text, encoding="utf-8")
        whole = subprocess.run([*command, failed[0]], cwd=copy, capture_output=True, check=False)
        return failed[0] if whole.returncode == 0 else ""


def main() -> int:
    """Try all breakages; return 1 if any is not seen."""
    missed = 0
    for breakage in BREAKAGES:
        found = caught(breakage)
        missed += not found
        sys.stdout.write(f"{breakage.name}: {found or 'NOT SEEN'}\n")
        sys.stdout.flush()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
