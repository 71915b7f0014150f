"""Options that several benchmarks share, and the checks of their values. Imports no JAX."""

import argparse
from pathlib import Path
from typing import get_args

from dms_jax.config import ImplementationName
from dms_jax.errors import ConfigError

SHAPES = "smollm2-135m, llama-3.2-1b or qwen3-8b"  # named by files of configs/models


def add_model(parser: argparse.ArgumentParser, default: str, default_text: str = "%(default)s") -> None:
    """Add --model, --layers and --implementation."""
    model = f"a folder, or a shape with random weights: {SHAPES} (default {default_text})"
    parser.add_argument("--model", default=default, metavar="FOLDER_OR_SHAPE", help=model)
    layers = "layers of a model with random weights; 0 is as many as the shape has (default %(default)s)"
    parser.add_argument("--layers", type=int, default=0, metavar="N", help=layers)
    parser.add_argument(
        "--implementation",
        choices=get_args(ImplementationName),
        default="auto",
        help="implementation of attention and cache (default %(default)s)",
    )


def check_at_least(options: argparse.Namespace, **minimums: int) -> None:
    """Raise ConfigError for an option below its minimum."""
    for name, minimum in minimums.items():
        if getattr(options, name) < minimum:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} must be at least {minimum}, got {getattr(options, name)}; use {option} {minimum}"
            )


def check_minutes(minutes: float) -> None:
    """Raise ConfigError for a --minutes that leaves no time."""
    if not minutes > 0:
        raise ConfigError(f"--minutes must be above 0, got {minutes:g}; use --minutes 9")


def check_output(path: Path) -> None:
    """Raise ConfigError unless --output can be a file in an existing folder."""
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"--output must be a file in an existing folder, got {path}")


def parse_ratios(text: str) -> list[float]:
    """Parse the comma-separated compression ratios of --cr."""
    try:
        ratios = [float(part) for part in text.split(",") if part]
    except ValueError:
        raise ConfigError(f"--cr must be numbers separated by commas, such as 1,2,4; got {text!r}") from None
    if bad := [ratio for ratio in ratios if not ratio >= 1]:
        raise ConfigError(f"--cr must be at least 1, which keeps everything, got {bad[0]:g}")
    return ratios
