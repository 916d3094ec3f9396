"""A place of this session's own for the code of hf-remote models."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def modules(private_modules: None) -> None:
    """Every test here may load such code."""
