"""Training: loss, step, optimizers, loop, checkpoints, run log, progress."""
