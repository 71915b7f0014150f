"""Retrofit a pretrained model with an eviction policy, by distillation from itself.

    python -m train.retrofit                                             # embedded default: SmolLM2-135M, Wikipedia + Python docs
    python -m train.retrofit --mesh 8x1                                  # the same on 8 devices (simulated on a CPU)
    python -m train.retrofit --config configs/train/llama3p2_1b.yaml --mesh 8x1
    python -m train.retrofit --set model=FOLDER --set data=FILE.jsonl --set dms.window_size=256 --set dms.target_cr=4

OUTPUT/ receives metrics.jsonl, checkpoints/, plots, report.json and export/, the folder that others load.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dms_jax.config import ConfigError, DMSConfig, build, nearest_name, override, read_yaml
from dms_jax.command import run_command

if TYPE_CHECKING:
    from train.step import StepConfig

# The embedded default's recipe, measured in docs/experiments.md, is the default of every field.


@dataclass(frozen=True)
class OptimizerConfig:
    """optax.adamw; all but the rate are the reference's values (Model-Optimizer `qwen3_8b.yaml`)."""

    learning_rate: float = 1e-4  # > 0
    warmup_steps: int = 0  # linear from 0
    decay_steps: int = 0  # linear to a tenth of the rate over the last steps; 0 keeps it constant
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # of the global gradient, > 0
