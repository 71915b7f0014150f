"""The program `dms-jax`, also typed `python -m dms_jax`. It runs the command that its first argument names."""

import functools
import importlib
import sys

from dms_jax.command import DOORS, VERSION, run_command
from dms_jax.errors import ConfigError, suggestion

SUMMARIES = {
    "retrofit": "train a pretrained model to evict keys and values, by distillation from itself",
    "plan": "predict whether a retrofit or a server fits on named hardware, and how fast it is",
    "inspect": "estimate before training which compression ratio a model bears on given text",
    "generate": "continue text with a model over a compact cache: prompts or a chat",
    "evaluate": "measure what cache policies cost: divergence, answers to tasks, live tokens",
    "hyperscale": "measure whether more or longer samples pay off with a compressed cache",
    "report": "draw an HTML page and figures from the results of `evaluate`",
}
USAGE = f"""usage: dms-jax COMMAND [options]
       dms-jax --version

Dynamic Memory Sparsification: train and run language models that learn which keys and values to forget.

commands:
{chr(10).join(f"  {name:<12}{summary}" for name, summary in SUMMARIES.items())}

`dms-jax COMMAND --help` lists the options of a command and shows examples."""


def main() -> None:
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        run_command("", lambda: print(USAGE))
    elif name == "--version":
        run_command("", lambda: print(VERSION))
    elif name in DOORS:
        run_command(name, lambda: importlib.import_module(f"dms_jax.commands.{name}").main(argv))
    else:
        run_command("", functools.partial(_unknown, name))


def _unknown(name: str) -> None:
    raise ConfigError(f"unknown command {name!r}; {suggestion(name, DOORS)}")


if __name__ == "__main__":
    main()
