"""Comparisons: a plan in a file, runs that train every variant on the same text, and reports of the results."""
