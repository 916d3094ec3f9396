"""Pretrained models with fewer query heads: which heads stay, what they take over, and how the rest is healed."""
