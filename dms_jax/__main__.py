"""All commands behind one name: `dms-jax NAME ...`, or `python -m dms_jax NAME ...`."""

import functools
import importlib
import sys

from dms_jax import __version__
from dms_jax.command import DOORS, run_command
from dms_jax.errors import suggestion

USAGE = f"usage: dms-jax COMMAND [options]\n\ncommands: {', '.join(DOORS)}\n`dms-jax COMMAND --help` lists the options of one."


def main() -> None:
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
    elif name == "--version":
        print(f"dms-jax {__version__}")
    elif name in DOORS:
        run_command(name, functools.partial(importlib.import_module(f"dms_jax.commands.{name}").main, argv))
    else:
        print(f"dms-jax: unknown command {name!r}; {suggestion(name, DOORS)}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
