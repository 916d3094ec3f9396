"""Conversion of pretrained models to fewer query heads: choose heads, refit the others, heal the model."""

from sqa.conversion.records import Conversion
from sqa.conversion.run import convert
from sqa.conversion.settings import Settings

__all__ = ["Conversion", "Settings", "convert"]
