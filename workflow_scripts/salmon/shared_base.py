"""Policy, reference, value and reward model as four LoRA adapters on one (quantised) base model.

Only one adapter is active at a time, inside `use`. Switching between a forward pass and its backward pass would
silently give zero gradients, so each loss is backpropagated within its own `use` block.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import TaskType
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from salmon.adapters import add_lora, load_adapter, of_adapter
from salmon.batching import right_pad
from salmon.config import Lora, Model, PolicyPrompt, PpoTexts
from salmon.encoding import check_query_length
from salmon.errors import UserError
from salmon.likelihood import answer_logprobs
from salmon.models import check_context, head_width, load_base, prepare, read_head

Role = Literal["policy", "reference", "value", "reward"]
# The policy's adapter has PEFT's default name, so it is saved as an ordinary adapter folder.
_ADAPTER = {"policy": "default", "reference": "reference", "value": "value", "reward": "reward"}


class SharedBase(nn.Module):
    """Four models in the memory of one base model.

    The policy starts from the initial policy's adapter, or as a new LoRA if that has none (then the reference
    is the bare base model). The value model starts from the reward model, adapter and head.
    """

    def __init__(self, model: Model, lora: Lora, reward_model: Path, device: torch.device, *, seed: int) -> None:
        super().__init__()
        if model.dtype == "float16":
            # A minibatch's loss is divided by all of its tokens, and float16 ends at 6e-8.
            raise UserError(
                "model.dtype is float16, in which most of RL's gradients would silently become 0: set it to bfloat16, "
                "or to float32 on a GPU without bfloat16"
            )
        head = read_head(reward_model).to(device)  # first, to refuse a bad head before the base model is loaded
        base = prepare(load_base(model, device), model)
        if head.shape[1] != head_width(base):
            raise UserError(
                f"the head of reward model {reward_model} reads {head.shape[1]} numbers, but {model.base} gives "
                f"{head_width(base)}: it was trained on another base model"
            )
        torch.manual_seed(seed)
        if model.adapter:
            revision = model.adapter_revision
            self.lm = load_adapter(base, model.adapter, _ADAPTER["policy"], revision=revision, trainable=True)
            load_adapter(self.lm, model.adapter, _ADAPTER["reference"], revision=revision)
        else:
            self.lm = add_lora(base, lora, TaskType.CAUSAL_LM)
        self.has_reference_adapter = model.adapter is not None
        load_adapter(self.lm, str(reward_model), _ADAPTER["reward"], head_elsewhere=True)
        load_adapter(self.lm, str(reward_model), _ADAPTER["value"], trainable=True, head_elsewhere=True)
        self.reward_head = nn.Parameter(head.clone(), requires_grad=False)
        self.value_head = nn.Parameter(head.clone())
        self.device = device
        self.generation_config = self.lm.generation_config
        self._trained = [
            parameter
            for name, parameter in self.lm.named_parameters()
            if any(of_adapter(name, _ADAPTER[role]) for role in ("policy", "value")) and "lora_" in name
        ]
        self._trained.append(self.value_head)
        self._mark_trained()
        self.eval()

    def trained(self) -> list[nn.Parameter]:
        """The weights that the optimiser changes: the adapters of policy and value model, and the value head."""
        return self._trained

    def train(self, mode: bool = True) -> "SharedBase":
        """Enter training mode only to recompute activations, so that there is no dropout anywhere.

        As long as nothing has changed, the ratio of new and old policy must be 1.
        """
        super().train(False)
        for module in self.modules():
            module.training = mode and hasattr(module, "gradient_checkpointing")
        return self

    @contextmanager
    def use(self, role: Role) -> Iterator[nn.Module]:
        """Make one of the four models active; yields this module, which then acts as that causal language model."""
        if role == "reference" and not self.has_reference_adapter:
            with self.lm.disable_adapter():
                yield self
        else:
            self.lm.set_adapter(_ADAPTER[role])
            self._mark_trained()
            yield self
        self._mark_trained()

    def forward(self, *, head: Literal["value", "reward"] | None = None, **inputs: Any) -> Any:
        """Run the active model. All weights are used in here, because ZeRO-3 gathers weights when modules are called.

        Args:
            head: None for the causal language model's output, with logits; otherwise no logits are computed.
            inputs: inputs of the causal language model.

        Returns:
            The language model's output, or the head's values at each token, float32 [B, T].
        """
        if head is None:
            return self.lm(**inputs)
        weight = self.value_head if head == "value" else self.reward_head
        hidden = self.lm.get_base_model().base_model(**inputs, use_cache=False).last_hidden_state
        return (hidden.float() @ weight.float().T).squeeze(-1)

    def logprobs(
        self,
        queries: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        temperature: float,
        *,
        most: int = 0,
        with_entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log probabilities of responses, and entropies; call within `use("policy")` or `use("reference")`.

        For arguments and results, see `likelihood.answer_logprobs`.
        """
        return answer_logprobs(self.lm, queries, responses, temperature, most=most, with_entropy=with_entropy)

    def values(self, queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> torch.Tensor:
        """Values before each response token; call within `use("value")`. float32 [B, R]."""
        tokens = right_pad([[*query, *response] for query, response in zip(queries, responses, strict=True)])
        values: torch.Tensor = self(head="value", input_ids=tokens.to(self.device))
        rows = zip(values, queries, responses, strict=True)
        return pad_sequence(
            [row[len(query) - 1 : len(query) - 1 + len(response)] for row, query, response in rows], batch_first=True
        )

    def rewards(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Reward of tokenised reward-model texts, read at the last token; call within `use("reward")`. float32 [B]."""
        values: torch.Tensor = self(head="reward", input_ids=right_pad(texts).to(self.device))
        return values[torch.arange(len(texts)), torch.tensor([len(text) - 1 for text in texts])]

    def save_policy(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write the policy as a PEFT folder (safetensors) that loads on the same base model.

        Args:
            folder: a new folder.
            weights: the weights of `trained_names`, if DeepSpeed keeps shards of them.
        """
        state = weights and {name.removeprefix("lm."): value for name, value in weights.items()}
        # If LoRA is on the embeddings, PEFT would also save these, although they are the base model's.
        self.lm.save_pretrained(
            str(folder), selected_adapters=[_ADAPTER["policy"]], state_dict=state, save_embedding_layers=False
        )

    def save_trained(self, file: Path) -> None:
        """Write all trained parameters exactly, to resume later."""
        save_file({str(index): parameter.detach().contiguous() for index, parameter in enumerate(self._trained)}, file)

    def load_trained(self, file: Path) -> None:
        """Read the file of `save_trained`."""
        saved = load_file(file, device=str(self.device))
        with torch.no_grad():
            for index, parameter in enumerate(self._trained):
                parameter.copy_(saved[str(index)])

    def _mark_trained(self) -> None:
        """Switching adapters changes which parameters require gradients; restore it: only ours do."""
        self.lm.requires_grad_(False)
        for parameter in self._trained:
            parameter.requires_grad_(True)


def check_lengths(
    shared: SharedBase, tokenizer: PreTrainedTokenizerBase, ppo: PpoTexts, policy_prompt: PolicyPrompt
) -> None:
    """Refuse lengths of RL's texts that exceed the model's positions; errors as for `models.check_context`."""
    check_query_length(tokenizer, ppo, policy_prompt)
    longest = ppo.query_length + ppo.response_length
    check_context(shared.lm, longest, "ppo.query_length + ppo.response_length")
    check_context(shared.lm, ppo.reward_max_length, "ppo.reward_max_length")
