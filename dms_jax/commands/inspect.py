"""Before training, an answer: which compression ratio does a model bear on given text?

    python -m train.inspect                                                # SmolLM2-135M on the default text
    python -m train.inspect --set model=FOLDER --set data=FILE.jsonl
    python -m train.inspect --config configs/train/qwen3_8b.yaml --mesh 8x1
    python -m train.inspect --set length=4096 --set dms.window_size=256 --set label_rows=24 --set eval_rows=10

The evict head is fitted in closed form, as at the start of a retrofit. On held-out rows, the command then estimates the
KL at several compression ratios and measures it at two of them. It prints a table, and writes inspect.json and
inspect.png, which also show what each head keeps, to the output folder (key `output`). The keys mean what they mean in
a retrofit. Those that only concern training are refused; those in a file of a retrofit (--config) do not count, which a
line on stderr says.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from dms_jax.command import Parser
from dms_jax.commands.retrofit import add_key_options, start_mesh
from dms_jax.config_reader import keys_help, parse_assignment
from dms_jax.errors import ConfigError, suggestion
from dms_jax.files import read_yaml, write_json
from dms_jax.training.retrofit_config import RetrofitConfig, read_config
from dms_jax.writer_lock import only_writer

NAME = "inspect"
DEFAULTS: dict[str, Any] = {"output": "runs/inspect", "label_rows": 6, "eval_rows": 3}
KEYS = ("model", "data", "output", "label_rows", "eval_rows", "length", "seed", "mesh", "dtype", "remat")
KEYS += ("implementation", "dms")
FILES = ("inspect.json", "inspect.png")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    keys = keys_help(RetrofitConfig(**DEFAULTS), only=KEYS)
    parser = Parser(
        NAME,
        __doc__,
        compiles=True,
        epilog=f"keys that count (key = default, range or choices, and meaning):\n{keys}",
    )
    add_key_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    config = configuration(options.config, options.assignments, options.mesh)
    output = Path(config.output)
    with only_writer(output, "choose another --set output=FOLDER", is_folder=True):
        if (output / FILES[0]).exists():
            raise ConfigError(f"{output} already contains an inspection; choose another --set output=FOLDER")
        config = start_mesh(config, "")
        from dms_jax.provenance import versions
        from dms_jax.training.inspection import inspect_model
        from dms_jax.training.plots import plot_inspection
        from dms_jax.training.run import check_writable

        check_writable(output, FILES)
        inspection = inspect_model(config)
        print(inspection.table())
        plot_inspection(inspection, output / FILES[1])
        write_json(output / FILES[0], {"versions": versions()} | inspection.as_json())
        print(f"\nNumbers and picture are in {output}.")
    return 0


def configuration(path: str | None, assignments: list[str], mesh: str | None) -> RetrofitConfig:
    """Read the keys of an inspection; its defaults are DEFAULTS and those of a retrofit in mode adapter.

    The file at `path` must be that of a retrofit. Its output folder and the keys that only concern training do not
    count, so that the file of a planned retrofit can be inspected.
    """
    counted = [key for key in KEYS if key != "output"]
    if path is not None:
        read_config(path, [], None)  # refuses keys and values that no retrofit has
        if unused := [key for key in read_yaml(path) if key not in counted]:
            print(f"keys of {path} that do not count in an inspection: {', '.join(unused)}", file=sys.stderr)
    for assignment in assignments:
        (key,) = parse_assignment(assignment)
        if key not in KEYS:
            raise ConfigError(f"`{key}` is not a key of an inspection, which does not train; {suggestion(key, KEYS)}")
    return read_config(path, assignments, mesh, {**DEFAULTS, "init": "fisher"}, counted)
