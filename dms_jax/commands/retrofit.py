"""Retrofit a pretrained model with a learned eviction policy, by distillation from itself.

    python -m train.retrofit                                   # SmolLM2-135M on the default text
    python -m train.retrofit --mesh 8x1                        # on 8 devices, which a CPU simulates
    python -m train.retrofit --mesh 2x2x2 --set length=131072  # long rows, each split over the context axis
    python -m train.retrofit --set model=FOLDER --set data=FILE.jsonl --set dms.window_size=256 --set dms.target_cr=4
    python -m train.retrofit --config configs/train/llama3p2_1b.yaml --mesh 8x1 --resume

The output folder (key `output`) receives metrics.jsonl, checkpoints/, report.json, two plots, and export/, the model
folder that the other commands load.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
from pathlib import Path

from dms_jax.command import Parser, start_devices
from dms_jax.commands.option_values import add_mesh
from dms_jax.config_reader import keys_help
from dms_jax.errors import ConfigError, suggestion
from dms_jax.training.retrofit_config import RetrofitConfig, read_config
from dms_jax.writer_lock import only_writer

NAME = "retrofit"


def add_key_options(parser: argparse.ArgumentParser) -> None:
    """Add the options `--config`, `--mesh` and `--set`, which set keys of the configuration."""
    parser.add_argument("--config", metavar="F.yaml", help="YAML file with any keys of a retrofit")
    text = "number of devices along the data, model and context axes, e.g. 8x1 or 2x2x2; sets the key mesh"
    add_mesh(parser, "AxB[xC]", text)
    once = "set one key, overriding --config; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments", help=once)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    keys = f"keys of --config and --set (key = default, range or choices, and meaning):\n{keys_help(RetrofitConfig())}"
    parser = Parser(NAME, __doc__, compiles=True, epilog=keys)
    add_key_options(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in the output folder"
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume: continue even if keys differ from those of the checkpoint",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print shapes, shardings, schedules and memory, without training or writing anything",
    )
    parser.add_argument(
        "--distributed",
        default="",
        metavar="auto|HOST:PORT,COUNT,INDEX",
        help="form one mesh from several processes, each started with this option; auto: detect them from Slurm, Open "
        "MPI, Kubernetes or a TPU pod; COUNT: number of processes, INDEX: index of this one",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    config = read_config(options.config, options.assignments, options.mesh)
    if options.dry_run:
        _refuse_begun(config, options.resume)
        config = start_mesh(config, options.distributed)
        from dms_jax.training.run import dry_run  # late: it loads JAX, and `--help` does not

        dry_run(config)
        return 0
    with contextlib.ExitStack() as held:
        begin = functools.partial(_begin, config, options.resume, held)
        if not options.distributed:
            begin()  # before JAX, which takes seconds to start
        config = start_mesh(config, options.distributed)
        from dms_jax.training.run import by_first_process, retrofit

        if options.distributed:
            by_first_process(begin)
        stopped_by = retrofit(config, resume=options.resume, accept_changes=options.accept_changes)
    return 128 + stopped_by if stopped_by else 0


def _begin(config: RetrofitConfig, resume: bool, held: contextlib.ExitStack) -> None:
    """Lock the output folder until `held` ends, and refuse one with another run."""
    output = Path(config.output)
    is_new = not (output / "checkpoints").is_dir()
    held.enter_context(only_writer(output, "choose another --set output=FOLDER", is_folder=True))
    if resume and is_new:
        siblings = [str(path.parent) for path in output.parent.glob("*/checkpoints")]
        hint = f"; {suggestion(str(output), siblings)}" if siblings else ""
        print(f"nothing to resume in {output}, so the run begins at step 0{hint}", file=sys.stderr)
    _refuse_begun(config, resume)


def _refuse_begun(config: RetrofitConfig, resume: bool) -> None:
    output = Path(config.output)
    if not resume and (output / "metrics.jsonl").exists():
        raise ConfigError(
            f"{output} already contains a run; continue it with --resume, or choose another --set output=FOLDER"
        )


def start_mesh(config: RetrofitConfig, distributed: str) -> RetrofitConfig:
    """Start JAX for `config.mesh`. Returns the configuration with `mesh` and `batch_size` resolved."""
    from dms_jax.sharding import parse_mesh

    if config.mesh == "auto":
        start_devices(1, distributed)
        import jax

        sizes = jax.device_count(), 1
        config = dataclasses.replace(config, mesh="x".join(map(str, sizes)))
    else:
        sizes = parse_mesh(config.mesh)
        if config.length % (context := math.prod(sizes[2:])):
            raise ConfigError(
                f"length {config.length} must be a multiple of {context}, the number of parts into which mesh "
                f"{config.mesh} splits a row"
            )
        start_devices(math.prod(sizes), distributed)
    multiple = sizes[0] * config.accumulate
    if config.batch_size % multiple:
        why = f"{sizes[0]} data-parallel devices x {config.accumulate} micro-batches"
        raise ConfigError(f"batch_size {config.batch_size} must be a multiple of {multiple}: {why}")
    return dataclasses.replace(config, batch_size=config.batch_size or multiple)
