"""Peak memory of the log probabilities of a long answer: all logits at once, or some at a time.

    python benchmarks/memory.py [--response 1024] [--vocabulary 128256] [--hidden 256]

Both ways run one after the other, in separate processes: once for log probabilities and entropies alone, and once with
the gradient that they pass to the layers. The table shows the memory (largest resident set) beyond that of a process
that computes only the layers, and the difference of the two ways' numbers. The first way is this project's former one:
the model's logits in float32, and their log-sum-exp and entropy.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "workflow_scripts")]

from salmon import likelihood, ppo_math  # noqa: E402

QUERY = 32


def compute(way: str, arguments: argparse.Namespace) -> None:
    """Run one way in this process; print its peak and some of its numbers as JSON."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    norm = model.model.norm.weight.requires_grad_(arguments.gradient)
    tokens = torch.randint(3, arguments.vocabulary, (QUERY + arguments.response,)).tolist()
    query, response = tokens[:QUERY], tokens[QUERY:]
    with torch.set_grad_enabled(arguments.gradient):
        if way == "layers":
            logprobs = model.model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[..., 0]
        elif way == "whole":
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False, logits_to_keep=len(response) + 1).logits
            logprobs, _ = ppo_math.token_logprobs(logits[:, :-1], torch.tensor([response]), 1.0, with_entropy=True)
            del logits
        else:
            entropy = not arguments.gradient  # an update reports no entropy
            logprobs, _ = likelihood.answer_logprobs(model, [query], [response], 1.0, with_entropy=entropy)
    if arguments.gradient:
        logprobs.sum().backward()
    gradient = [] if norm.grad is None else norm.grad[:8].tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "numbers": logprobs[0, :8].tolist() + gradient}))


def main() -> None:
    """Print the table, or run one way of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--response", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--way", choices=["layers", "whole", "pieces"], help=argparse.SUPPRESS)
    parser.add_argument("--gradient", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        compute(arguments.way, arguments)
        return
    print(
        f"{arguments.response} tokens, {arguments.vocabulary} words: logits of "
        f"{4 * arguments.response * arguments.vocabulary / 2**20:.0f} MiB in float32\n"
    )
    print("| | all logits at once | some at a time | ratio | numbers differ by |")
    print("| --- | --- | --- | --- | --- |")
    for gradient in (False, True):
        found = {}
        for way in ("layers", "whole", "pieces"):
            line = [sys.executable, __file__, *sys.argv[1:], "--way", way, *(["--gradient"] if gradient else [])]
            found[way] = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
        whole, pieces = ((found[way]["peak"] - found["layers"]["peak"]) / 2**20 for way in ("whole", "pieces"))
        pairs = zip(found["whole"]["numbers"], found["pieces"]["numbers"], strict=True)
        away = max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)
        what = "with gradient" if gradient else "without gradient"
        print(f"| {what} | {whole:.0f} MiB | {pieces:.0f} MiB | {pieces / whole:.2f} | {away:.1e} |")


if __name__ == "__main__":
    main()
