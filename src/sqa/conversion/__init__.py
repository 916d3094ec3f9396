"""Pretrained models with fewer query heads: which heads stay, what they take over, and how the rest is healed."""

from sqa.conversion.records import Conversion
from sqa.conversion.run import convert
from sqa.conversion.settings import Settings

__all__ = ["Conversion", "Settings", "convert"]
