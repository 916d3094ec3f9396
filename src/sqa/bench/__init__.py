"""Measuring: one timing module, one description of the machine, and the benchmarks built on them."""
