"""Timing, and the description of the machine: for benchmarks, comparisons and conversions."""
