"""A model that vLLM serves on CPUs, where it takes heads of 32 numbers and more."""

from pathlib import Path

import pytest

from tests.conftest import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"), width=128)
