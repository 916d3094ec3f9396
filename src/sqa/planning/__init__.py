"""Closed forms and proposals: what the saving could buy, what a large model would take. Nothing here trains."""
