"""Templates: ours are complete, those of others work, and filling changes only the slots."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from salmon import templates
from salmon.config import PolicyPrompt
from salmon.configuration import check_templates
from salmon.errors import UserError
from salmon.text import join_instruction

ROOT = Path(__file__).parents[1]
OURS = ROOT / "prompts" / "templates"
FILES = {
    "judge": "prompts/templates/judge.txt",
    "pmp": "prompts/templates/reward_model_pmp.txt",
    "reward_model": "prompts/templates/reward_model.txt",
    "ppo": "prompts/templates/reward_model_rl.txt",
    "policy_prompt": "prompts/templates/policy.txt",
    "judge_endpoint": "prompts/templates/endpoint.txt",
}


def check(root: Path = ROOT, **files: str) -> list[str]:
    """Findings for a configuration with these template files."""
    named = FILES | files
    config: Any = SimpleNamespace(**{key: SimpleNamespace(template=path) for key, path in named.items()})
    config.policy_prompt = PolicyPrompt(template=named["policy_prompt"])
    config.evaluation = SimpleNamespace(judge_endpoint=config.judge_endpoint)
    return check_templates(config, root)


def test_our_templates_pass() -> None:
    assert check() == []
    assert check(policy_prompt="chat") == []


def test_policy_template_is_a_preamble_that_ends_with_the_users_marker() -> None:
    preamble = templates.read(OURS / "policy.txt")
    assert "Dromedary" in preamble
    assert "User Conversation" in preamble
    assert preamble.endswith("\n### User")
    prompt = templates.policy_prompt(preamble, "### Dromedary", "Say {Output}.")
    # Reference, defect 6: the instruction must be in the prompt.
    assert prompt == preamble + "\nSay {Output}.\n\n### Dromedary\n"


def test_judge_reads_the_principle_last_after_a_shared_prefix() -> None:
    template = templates.read(OURS / "judge.txt")
    shared, at, rest = template.partition("{Dimension}")
    assert at
    assert "{Definition}" not in shared
    assert [shared.index(slot) for slot in ("{UserInstruction}", "{OutputA}", "{OutputB}")] == sorted(
        shared.index(slot) for slot in ("{UserInstruction}", "{OutputA}", "{OutputB}")
    )
    assert rest.startswith(": {Definition}")
    assert template.endswith("the more {Dimension} output is Output (")
    texts = {"UserInstruction": "i", "OutputA": "a", "OutputB": "b"}
    one = templates.fill(template, **texts, Dimension="Concise", Definition="Short.")
    two = templates.fill(template, **texts, Dimension="Ethical", Definition="Good.")
    prefix = templates.fill(shared, **texts)
    assert one.startswith(prefix)
    assert two.startswith(prefix)


@pytest.mark.parametrize("name", ["reward_model_pmp", "reward_model", "reward_model_rl"])
def test_reward_model_reads_response_then_instruction_then_guideline(name: str) -> None:
    template = templates.read(OURS / f"{name}.txt")
    parts = ["{Output}", "{Input}", "## Guideline", *(["{Dimensions}"] if name != "reward_model_pmp" else [])]
    positions = [template.index(part) for part in parts]
    assert positions == sorted(positions)
    assert template.endswith("\nThe quality of the output is")


def test_rl_template_is_the_training_one_with_three_lines_more() -> None:
    """They come before the drawn principles; one sentence follows all principles, in training as in RL."""
    training = templates.read(OURS / "reward_model.txt").splitlines()
    rl = templates.read(OURS / "reward_model_rl.txt").splitlines()
    fixed = [line for line in rl if line.startswith("- ")]
    assert len(fixed) == 3
    assert [line for line in rl if line not in fixed] == training
    place = rl.index("{Dimensions}")
    assert rl[place - 3 : place] == fixed
    assert rl[place + 1 : place + 4] == ["", "A good output meets every one of them.", ""]


def test_filling_leaves_braces_in_values_and_in_the_template_alone() -> None:
    values = {"OutputA": "{OutputB} {0} {x!r} {{}}", "OutputB": "B", "UserInstruction": "{OutputA}\\1 \\g<0>"}
    filled = templates.fill("{UserInstruction}|{OutputA}|{OutputB}|{unknown}|{}|{{OutputB}}", **values)
    assert filled == "{OutputA}\\1 \\g<0>|{OutputB} {0} {x!r} {{}}|B|{unknown}|{}|{B}"


def test_a_slot_may_be_left_for_later() -> None:
    assert templates.fill("{OutputA} {OutputB}", OutputA="1") == "1 {OutputB}"


def test_reading_strips_one_line_break_only(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    for text, expected in [("a (", "a ("), ("a (\n", "a ("), ("a\n\n", "a\n"), ("\n a ", "\n a ")]:
        file.write_text(text, encoding="utf-8")
        assert templates.read(file) == expected


def test_unreadable_templates_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin1\.txt cannot be read: not UTF-8 \(byte 3\)"):
        templates.read(tmp_path / "latin1.txt")
    with pytest.raises(UserError, match=r"missing\.txt cannot be read"):
        templates.read(tmp_path / "missing.txt")


def test_the_check_names_key_file_and_slots(tmp_path: Path) -> None:
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    findings = check(
        judge=write("judge.txt", "{UserInstruction} {OutputA} {OutputB} {Dimension}"),
        pmp=write("pmp.txt", "{Output} {Input} {Dimensions}"),
        reward_model=str(tmp_path / "gone.txt"),
    )
    assert len(findings) == 3
    missing, extra, gone = findings
    assert missing.startswith("judge.template: ")
    assert "judge.txt" in missing
    assert "{Definition}" in missing
    assert extra.startswith("pmp.template: ")
    assert "{Dimensions}" in extra
    assert gone.startswith("reward_model.template: ")
    assert "gone.txt" in gone


def test_templates_in_the_authors_format_work(tmp_path: Path) -> None:
    """The slots of the authors' files, in another order, {Dimension} several times, no final line break."""
    judge = tmp_path / "judge.txt"
    judge.write_text(
        "System.\n\n{UserInstruction}\n(a) {OutputA}\n(b) {OutputB}\n{Dimension}: {Definition}\n"
        "Which is more {Dimension}? The more {Dimension} one is Output ("
    )
    assert check(judge=str(judge)) == []
    filled = templates.fill(
        templates.read(judge), UserInstruction="I", OutputA="A", OutputB="B", Dimension="Vivid", Definition="D"
    )
    assert filled == "System.\n\nI\n(a) A\n(b) B\nVivid: D\nWhich is more Vivid? The more Vivid one is Output ("


def test_small_helpers() -> None:
    assert join_instruction("do", "") == "do"
    assert join_instruction("do", "this") == "do\n\nthis"
    assert templates.bullets(["a", "b"]) == "- a\n- b"
    assert templates.bullets([]) == ""
