"""How time is measured, and on what machine: used by benchmarks, comparisons and conversions."""
