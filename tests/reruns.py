"""What Snakemake reruns in the demo when a key of the configuration changes: `python tests/reruns.py [CHECKOUT]`.

It uses a copy of the checkout, with a placeholder for every result: Snakemake's records and the files' times count
here, as in `tests/test_workflow.py`. Prints a table in Markdown.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "Snakefile",
    "config.yaml",
    "rules",
    "workflow_scripts",
    "demo",
    "prompts",
    "evaluation_tasks",
    "profiles",
    "envs",
)
# At least one from every section.
CHANGES = (
    ("targets", "targets=[policies]"),
    ("seed", "seed=1"),
    ("model.dtype", "model={dtype: bfloat16}"),
    ("model.attention", "model={attention: eager}"),
    ("policy_prompt.assistant_marker", "policy_prompt={assistant_marker: 'A:'}"),
    ("sft.epochs", "sft={epochs: 2.0}"),
    ("prompts.seed", "prompts={seed: 7}"),
    ("sampling.temperature", "sampling={temperature: 0.7}"),
    ("sampling.shards", "sampling={shards: 3}"),
    ("judge.max_length", "judge={max_length: 500}"),
    ("judge.turn_markers", "judge={turn_markers: ['User:']}"),
    ("judge.shards", "judge={shards: 3}"),
    ("aggregation.passes", "aggregation={passes: 7}"),
    ("pmp_data.min_score_ratio", "pmp_data={min_score_ratio: 4.0}"),
    ("scoring.format", "scoring={format: chat}"),
    ("lora.r", "lora={r: 8}"),
    ("pmp.learning_rate", "pmp={learning_rate: 0.002}"),
    ("pmp.save_steps", "pmp={save_steps: 7}"),
    ("reward_model.learning_rate", "reward_model={learning_rate: 0.002}"),
    ("reward_model.save_steps", "reward_model={save_steps: 7}"),
    ("rl_prompts.max_tokens", "rl_prompts={max_tokens: 31}"),
    ("ppo.kl_coefficient", "ppo={kl_coefficient: 0.5}"),
    ("ppo.save_steps", "ppo={save_steps: 7}"),
    ("runs.concise", "runs={concise: {ppo: {max_steps: 11}}}"),
    ("pathvars.logs", "pathvars={logs: elsewhere/logs}"),
)


def snakemake(folder: Path, *words: str) -> str:
    line = [sys.executable, "-m", "snakemake", "--profile", "profiles/demo", *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def pretend(folder: Path) -> None:
    """Put a placeholder in place of every output, and let Snakemake record it."""
    for line in snakemake(folder, "--summary", "demo_evaluation").splitlines():
        if line.startswith("results/"):
            output = folder / line.split("\t")[0]
            (output.parent if output.suffix else output).mkdir(parents=True, exist_ok=True)
            if output.suffix:
                output.write_text(output.name)
    snakemake(folder, "--touch", "--forceall", "demo_evaluation")


def reruns(folder: Path, *words: str) -> str:
    """Rules with their numbers of jobs."""
    said = snakemake(folder, "-n", "demo_evaluation", *words)
    if "Nothing to be done" in said:
        return "nothing"
    table = said.rsplit("Job stats:", 1)[1]
    jobs = [
        (rule, int(count))
        for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.M)
        if rule not in ("total", "demo_evaluation", "all")
    ]
    return ", ".join(f"{rule} x {count}" if count > 1 else rule for rule, count in sorted(jobs))


def main() -> None:
    """Print the table."""
    checkout = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in PARTS:
            (shutil.copytree if (checkout / name).is_dir() else shutil.copy)(checkout / name, folder / name)
        pretend(folder)
        lines = [("nothing", reruns(folder)), *((key, reruns(folder, "--config", change)) for key, change in CHANGES)]
        shutil.rmtree(folder / "results" / "demo" / "check_model" / "training")
        lines.append(("(check_model/training deleted)", reruns(folder)))
    sys.stdout.write("| changed | reruns |\n| --- | --- |\n")
    sys.stdout.write("".join(f"| `{key}` | {rules} |\n" for key, rules in lines))


if __name__ == "__main__":
    main()
