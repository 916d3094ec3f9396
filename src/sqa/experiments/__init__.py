"""A comparison: a plan in a file, runs that train every variant on the same text, and the table of what came out."""
