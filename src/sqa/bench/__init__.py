"""Benchmarks of attention, training steps, prefill and decoding."""
