"""Optimizer table, train state, step and loop."""

STOPPED_EARLY = 75  # exit code: the same command goes on (sysexits.h: temporary failure)
TRAIN_STEP = "train_step"  # name of the compiled step
