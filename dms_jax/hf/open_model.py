"""Open what the options --model and --adapter of a command name: the model and its tokenizer."""

import sys

import jax
import jax.numpy as jnp

from dms_jax.config import ImplementationName
from dms_jax.errors import ConfigError
from dms_jax.hf.adapter import load_adapter
from dms_jax.hf.folder import load, policy_origin, read_config
from dms_jax.hf.hf_tokenizer import Tokenizer, load_tokenizer
from dms_jax.models.decoder import Decoder
from dms_jax.sharding import num_shards


def open_model(
    name: str,
    adapter: str | None,
    dtype: jnp.dtype,
    implementation: ImplementationName = "auto",
    allow_non_finite: bool = False,
    quiet: bool = False,
) -> tuple[Decoder, Tokenizer]:
    """Load a model, with its adapter if one is given, and its tokenizer.

    If a mesh is set, the model is sharded over it. Unless `quiet`, print on stderr where the policy came from.
    """
    # Before the tokenizer, because the library that reads it would blame the tokenizer for a damaged config.json.
    config = read_config(name)
    tokenizer = load_tokenizer(name)  # before the weights, which take long
    mesh = None if jax.sharding.get_abstract_mesh().empty else jax.sharding.get_mesh()
    devices = num_shards("kv_heads")
    if config.num_kv_heads % devices:
        raise ConfigError(
            f"--mesh must split the {config.num_kv_heads} KV heads of {name} evenly, got {devices} devices for them; "
            f"use --mesh AxB with a B that divides {config.num_kv_heads}"
        )
    model = load(name, dtype=dtype, mesh=mesh, implementation=implementation, allow_non_finite=allow_non_finite)
    if adapter:
        model = load_adapter(model, adapter, allow_non_finite=allow_non_finite)
    if (line := policy_origin(model)) and not quiet:
        print(line, file=sys.stderr)
    return model, tokenizer
