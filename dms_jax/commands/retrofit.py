"""Retrofit a pretrained model with an eviction policy, by distillation from itself.

    python -m train.retrofit                                   # embedded default: SmolLM2-135M on Wikipedia and the Python docs
    python -m train.retrofit --mesh 8x1                        # the same on 8 devices (simulated on a CPU)
    python -m train.retrofit --mesh 2x2x2 --set length=131072  # long rows: data x model x context, the context axis splits each row
    python -m train.retrofit --set model=FOLDER --set data=FILE.jsonl --set dms.window_size=256 --set dms.target_cr=4
    python -m train.retrofit --config configs/train/llama3p2_1b.yaml --mesh 8x1 --resume

OUTPUT receives metrics.jsonl, checkpoints/, report.json, two plots and export/, the folder that others load.
"""

import argparse
import dataclasses
import math
from pathlib import Path

from dms_jax.command import Parser, start_devices
from dms_jax.errors import ConfigError
from dms_jax.config_reader import keys_help
from dms_jax.training.retrofit_config import RetrofitConfig, read_config

NAME = "retrofit"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__, epilog=f"keys of --config and --set, with their defaults:\n{keys_help(RetrofitConfig())}")
    parser.add_argument("--config", metavar="F.yaml", help="a file of keys")
    parser.add_argument(
        "--mesh",
        metavar="AxB[xC]",
        help="data x model (x context) devices, e.g. 8x1; 2x2x2 splits each row's length over 2; a CPU simulates them",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="assignments",
        help="override one key; repeat for more",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in `output`")
    parser.add_argument(
        "--accept-changes", action="store_true", help="with --resume: go on although keys differ from the saved run's"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print shapes, shardings, schedule and memory; train nothing, write nothing",
    )
    parser.add_argument(
        "--distributed",
        default="",
        metavar="auto|HOST:PORT,COUNT,INDEX",
        help="several processes form one mesh; auto: as Slurm, Kubernetes or a TPU pod says",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    config = read_config(options.config, options.assignments, options.mesh)
    output = Path(config.output)
    if not options.resume and (output / "metrics.jsonl").exists():
        raise ConfigError(
            f"{output} already holds a run; continue it with --resume, or choose another --set output=FOLDER"
        )
    config = choose_devices(config, options.distributed)
    from dms_jax.training.run import Run

    if options.dry_run:
        from dms_jax.training.dry_run import dry_run_text

        run = Run(config, output, False, False, dry=True)
        if run.writer:
            print(dry_run_text(run))
        return 0
    return Run(config, output, options.resume, options.accept_changes).run()


def choose_devices(config: RetrofitConfig, distributed: str) -> RetrofitConfig:
    """Start JAX for `config.mesh`; the config with mesh and batch_size as they will be."""
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
                f"length {config.length} must be a multiple of {context}: mesh {config.mesh} splits each row into as many parts"
            )
        start_devices(math.prod(sizes), distributed)
    data = sizes[0]
    least = data * config.accumulate
    if config.batch_size % least:
        why = f"{data} data-parallel devices x {config.accumulate} micro-batches"
        raise ConfigError(f"batch_size {config.batch_size} must be a multiple of {least}: {why}")
    return dataclasses.replace(config, batch_size=config.batch_size or least)
