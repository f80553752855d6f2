"""A model that vLLM serves on CPUs, where attention heads need at least 32 numbers."""

from pathlib import Path

import pytest

from tests.conftest import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"), width=128)
