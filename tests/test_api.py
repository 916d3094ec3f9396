"""What `sqa` offers: every name is there, and says what it is."""

import inspect
import typing

import pytest

import sqa


@pytest.mark.parametrize("name", sorted(sqa.__all__))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(sqa, name)
    assert name in dir(sqa)
    if name in ("VARIANTS", "__version__"):
        return  # values, not functions
    assert inspect.getdoc(value), f"{name} has no docstring"
    if not inspect.isclass(value):
        assert typing.get_type_hints(value).get("return") is not None
        return
    own = [each for each, member in vars(value).items() if inspect.isfunction(member) and not each.startswith("_")]
    undocumented = [each for each in own if not inspect.getdoc(getattr(value, each)) and each != "forward"]
    assert undocumented == []
