"""Training one model once: the loop, its checkpoints and its evaluation."""
