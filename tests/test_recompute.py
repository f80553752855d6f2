"""Whether activations are recomputed: the kept memory is predicted, and the free memory decides."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from salmon import models, recompute
from salmon.config import Lora, Model
from tests import zoo

CPU = torch.device("cpu")


@pytest.fixture(params=["sdpa", "eager", "experts"])
def policy(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Any:
    base, attention = tiny_model, request.param
    if request.param == "experts":  # whose weights, with their adapters, are kept as well
        base, attention = tmp_path / "qwen3_moe", "sdpa"
        zoo.build("qwen3_moe", base)
    settings = Model(base=str(base), quantization="none", dtype="float32", attention=attention)
    return models.new_policy(settings, Lora(r=4), "cpu", 0)


def kept_by_autograd(policy: Any, tokens: int, rows: int = 1) -> int:
    """Bytes of the distinct storages that autograd saves, without those of weights, as its hooks see them."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    storages = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: storages.append(each.untyped_storage()), lambda _: _):
        policy.get_base_model().base_model(input_ids=torch.ones(rows, tokens, dtype=torch.long), use_cache=False)
    return sum({each.data_ptr(): each.nbytes() for each in storages if each.data_ptr() not in weights}.values())


@pytest.mark.parametrize("tokens", [10, 200, 333])
def test_what_a_pass_keeps(policy: Any, tokens: int) -> None:
    """The estimate also holds for rows of lengths that were not tried, and if attention keeps all probabilities."""

    def forward(ids: torch.Tensor) -> None:
        policy.get_base_model().base_model(input_ids=ids, use_cache=False)

    found = recompute.graph_bytes(forward, policy.parameters(), tokens, 3 * tokens, CPU)
    kept = kept_by_autograd(policy, tokens, rows=3)
    assert kept <= found * (1 + 1e-6)
    assert found < 1.02 * kept  # tables of positions are counted for each row, but exist once per batch


@pytest.mark.parametrize("kind", ["granite_hybrid", "falcon_h1", "qwen3_5", "lfm2"])
def test_what_a_pass_of_recurrent_layers_keeps(kind: str, tmp_path: Path) -> None:
    """They compute in chunks, to which shorter texts are padded."""
    zoo.build(kind, tmp_path)
    settings = Model(base=str(tmp_path), quantization="none", dtype="float32")
    policy = models.new_policy(settings, Lora(r=4), "cpu", 0)

    def forward(ids: torch.Tensor) -> None:
        policy.get_base_model().base_model(input_ids=ids, use_cache=False)

    found = recompute.graph_bytes(forward, policy.parameters(), 1000, 1000, CPU)
    assert found == pytest.approx(kept_by_autograd(policy, 1000), rel=0.06)


@pytest.mark.parametrize("tokens", [100, 350])
def test_memory_decides(policy: Any, tokens: int) -> None:
    """Free memory is just below, then just above what is needed for the costliest rows that the budget allows."""
    number = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    kept = max(kept_by_autograd(policy, tokens // rows, rows) for rows in range(1, 9) if tokens // rows <= 100)
    needed = 1.3 * kept + 12 * number + 1000

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

    assert wanted(0.98 * needed)
    assert not wanted(1.15 * needed)  # all rows are assumed to be as long as the longest
    assert wanted(1.15 * needed, besides=int(0.2 * needed))
    with mock.patch.object(recompute.distributed, "world", return_value=4):  # a quarter of 16 bytes, not 12
        assert not wanted(1.15 * needed - 8 * number, divided=True)
        assert wanted(0.98 * needed - 8 * number, divided=True)
    assert wanted(1e15, sharded=True)
    assert wanted(1e15, setting=True)
    assert not wanted(0, setting=False)


def test_what_is_free_on_this_machine() -> None:
    with Path("/proc/meminfo").open() as file:
        told = {name: int(number.split()[0]) * 1024 for name, number in (line.split(":") for line in file)}
    assert recompute.free_bytes(CPU) == pytest.approx(told["MemAvailable"], rel=0.2)
