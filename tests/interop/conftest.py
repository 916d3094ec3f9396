"""A place of this session's own for the code of hf-remote models."""

from collections.abc import Iterator

import pytest
from transformers import dynamic_module_utils


@pytest.fixture(scope="session", autouse=True)
def private_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies the code of hf-remote models to a cache it chose when it was imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
