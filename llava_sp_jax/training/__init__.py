"""Trains a model: optimizer table, train state, step and loop."""

STOPPED_EARLY = 75  # exit code: the same command resumes the run (EX_TEMPFAIL of sysexits.h)
TRAIN_STEP = "train_step"  # name of the compiled step
