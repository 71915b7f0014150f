"""Models to measure: a folder, or the shape of a well-known one with random weights."""

import os
import platform
import time

import jax
import jax.numpy as jnp
from flax import nnx

from dms_jax.config import ConfigError, DMSConfig, ModelConfig
from dms_jax.kernels.dispatch import Facts, choose
from dms_jax.models.decoder import Decoder
from dms_jax.models.parameters import Template, params_of
from dms_jax.provenance import versions

WINDOW = 128  # of the policy that is added to a model without one
SHAPES = {  # of the config.json of each
    "smollm2-135m": {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_layers": 30, "num_q_heads": 9,
                     "num_kv_heads": 3, "head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-1b": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_q_heads": 32,
                     "num_kv_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    "qwen3-8b": {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_layers": 36, "num_q_heads": 32,
                 "num_kv_heads": 8, "head_dim": 128, "qk_norm": True},
}  # fmt: skip


def load(name: str, layers: int, context: int, implementation: str = "auto", dtype: jnp.dtype | None = None, mesh=None):
    """A model with a policy, and where its weights are from; `layers` of a random one, 0 for as many as the named one has."""
    policy = DMSConfig(window_size=min(WINDOW, context // 8))
    dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    if name not in SHAPES:
        import dms_jax
        from dms_jax.hf.folder import open_source, resolve

        if layers:
            raise ConfigError(f"--layers goes with a named shape ({', '.join(SHAPES)}); a folder brings its own")
        has_policy = open_source(path := resolve(name))[1].dms is not None
        return dms_jax.load(path, dtype=dtype, implementation=implementation, mesh=mesh, dms=None if has_policy else policy), name
    shape = SHAPES[name] | ({"num_layers": layers} if layers else {})
    choose("train_attention", Facts(shape["head_dim"], jnp.bfloat16), implementation)  # refuses what cannot run
    config = ModelConfig(**shape, max_position_embeddings=1 << 20, dms=policy, implementation=implementation)
    model = Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)
    if mesh is not None:
        template, params = Template(model), params_of(model)
        model = template.merge(jax.device_put(params, template.shardings(list(params), mesh)))
    return model, "random"


def provenance() -> dict:
    """Versions, device, commit and, because much is measured on a CPU, which one."""
    return versions() | {"cpu": cpu_model(), "cores": cpu_cores(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.processor())
    except OSError:
        return platform.processor()


def cpu_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
