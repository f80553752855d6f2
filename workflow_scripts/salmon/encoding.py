"""Texts to the token ids that models read: the prompts of the policy."""

from transformers import PreTrainedTokenizerBase

from salmon import templates
from salmon.config import PolicyPrompt
from salmon.errors import UserError


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, instruction: str, prompt: PolicyPrompt, preamble: str
) -> list[int]:
    """Token ids of what the policy continues, special tokens included.

    Args:
        tokenizer: of the policy.
        instruction: with its input, if any (`text.join_instruction`).
        prompt: names the assistant's turn marker, or `chat`.
        preamble: text of the template file (see `read_preamble`).
    """
    if not prompt.is_chat:
        text = templates.policy_prompt(preamble, prompt.assistant_marker, instruction)
        return list(tokenizer(text)["input_ids"])
    if not tokenizer.chat_template:
        raise UserError("policy_prompt.template is `chat`, but the tokenizer has no chat template; name a file")
    turns = [{"role": "user", "content": instruction}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


def read_preamble(prompt: PolicyPrompt) -> str:
    """Text of the policy's template file; empty for `chat`."""
    return "" if prompt.is_chat else templates.read(prompt.template)
