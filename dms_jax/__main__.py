"""The program `dms-jax`, which is also `python -m dms_jax`: it runs the command that its first argument names."""

import functools
import importlib
import sys

from dms_jax import __version__
from dms_jax.command import DOORS, run_command
from dms_jax.errors import suggestion

USAGE = f"""usage: dms-jax COMMAND [options]

commands: {", ".join(DOORS)}
Type `dms-jax COMMAND --help` for the options of a command."""


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
