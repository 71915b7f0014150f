"""The retrofit: its configuration, data, loss and optimizer step, and the run from checkpoint to exported model.

Begin with `retrofit_config` (every key), then read `run` (prepare, restore, train, finish) and `step` (loss, gradients
and update). `data` turns text into batches, and `planning` predicts the memory and the time of a step.
"""
