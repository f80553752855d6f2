"""Whether activations are recomputed: what a pass keeps is foretold, and memory decides."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from salmon import models, recompute
from salmon.config import Lora, Model

CPU = torch.device("cpu")


@pytest.fixture(params=["sdpa", "eager"])
def policy(request: pytest.FixtureRequest, tiny_model: Path) -> Any:
    settings = Model(base=str(tiny_model), quantization="none", dtype="float32", attention=request.param)
    return models.new_policy(settings, Lora(r=4), "cpu", 0)


def kept_by_autograd(policy: Any, tokens: int) -> int:
    """Bytes of the distinct storages among what autograd saves, without those of weights: by its hooks, in order."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    storages = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: storages.append(each.untyped_storage()), lambda _: _):
        policy.get_base_model().base_model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=False)
    return sum({each.data_ptr(): each.nbytes() for each in storages if each.data_ptr() not in weights}.values())


@pytest.mark.parametrize("tokens", [10, 200, 333])
def test_what_a_pass_keeps(policy: Any, tokens: int) -> None:
    """Of rows of other lengths than those that are tried, also where attention keeps all of its probabilities."""
    found = recompute.graph_bytes(
        lambda ids: policy.get_base_model().base_model(input_ids=ids, use_cache=False), policy.parameters(), tokens, CPU
    )
    assert found == pytest.approx(kept_by_autograd(policy, tokens), rel=0.01)


@pytest.mark.parametrize("tokens", [100, 350])
def test_memory_decides(policy: Any, tokens: int) -> None:
    """What is free lies just below, then just above what is needed: as many rows of 100 tokens as there is room for."""
    number = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    needed = 1.3 * (tokens // 100) * kept_by_autograd(policy, 100) + 12 * number + 1000

    def wanted(free: float, **changes: Any) -> bool:
        options: dict[str, Any] = {"longest": 100, "tokens": tokens, "device": CPU, "besides": 1000, **changes}
        setting = options.pop("setting", "auto")
        with mock.patch.object(recompute, "free_bytes", return_value=int(free)):
            return recompute.is_wanted(
                setting,
                lambda ids: policy.get_base_model().base_model(input_ids=ids, use_cache=False),
                policy.parameters(),
                **options,
            )

    assert wanted(0.99 * needed)
    assert not wanted(1.01 * needed)
    assert wanted(1.01 * needed, besides=int(0.1 * needed))
    assert wanted(1e15, sharded=True)
    assert wanted(1e15, setting=True)
    assert not wanted(0, setting=False)


def test_what_is_free_on_this_machine() -> None:
    with Path("/proc/meminfo").open() as file:
        told = {name: int(number.split()[0]) * 1024 for name, number in (line.split(":") for line in file)}
    assert recompute.free_bytes(CPU) == pytest.approx(told["MemAvailable"], rel=0.2)
