"""Open what the options --model and --adapter of a command name: the model and its tokenizer."""

import sys

import jax.numpy as jnp

from dms_jax.config import ImplementationName
from dms_jax.hf.adapter import load_adapter
from dms_jax.hf.folder import load, policy_origin, read_config
from dms_jax.hf.hf_tokenizer import Tokenizer, load_tokenizer
from dms_jax.models.decoder import Decoder


def open_model(
    name: str,
    adapter: str | None,
    dtype: jnp.dtype,
    implementation: ImplementationName = "auto",
    allow_non_finite: bool = False,
    quiet: bool = False,
) -> tuple[Decoder, Tokenizer]:
    """Load a model, with its adapter if one is given, and its tokenizer.

    Unless `quiet`, print on stderr where the policy came from.
    """
    read_config(name)  # the library that reads the tokenizer would blame the tokenizer for a damaged config.json
    tokenizer = load_tokenizer(name)  # before the weights, which take long
    model = load(name, dtype=dtype, implementation=implementation, allow_non_finite=allow_non_finite)
    if adapter:
        model = load_adapter(model, adapter, allow_non_finite=allow_non_finite)
    if (line := policy_origin(model)) and not quiet:
        print(line, file=sys.stderr)
    return model, tokenizer
