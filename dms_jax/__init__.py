"""Dynamic Memory Sparsification for pretrained language models, in JAX.

The names in `__all__` are the public API; begin with `load`, `prefill` and `generate`. Each name is imported when it is
first used, so that a light submodule, such as a command that only prints `--help`, can be imported without loading JAX.
"""

import importlib

__version__ = "0.1.0"

_HOME = {  # public name -> the module that defines it
    "ConfigError": "errors",
    "full_tracebacks": "errors",
    "DMSConfig": "config",
    "ModelConfig": "config",
    "compression_ratio": "core.cache_base",
    "fork": "core.cache_base",
    "GenerationConfig": "engine.generation_config",
    "generate": "engine.generation",
    "environment": "engine.machine",
    "calibrate": "engine.calibration",
    "head_budgets": "engine.head_budgets",
    "load_cache": "hf.cache_file",
    "save_cache": "hf.cache_file",
    "BudgetPolicy": "policies.budget_policy",
    "CachePolicy": "policies.cache_policy",
    "Expiries": "core.compact_cache",
    "Pairs": "policies.budget_policy",
    "Selection": "core.compact_cache",
    "SlotBounds": "policies.cache_policy",
    "check_policy": "policies.policy_check",
    "compress_prompt": "policies.prompt_compression",
    "decode_step": "engine.decoding",
    "init_cache": "engine.decoding",
    "prefill": "engine.decoding",
    "init_pages": "engine.page_memory",
    "compression_loss": "core.losses",
    "kl_student_teacher": "core.losses",
    "kl_teacher_student": "core.losses",
    "load_adapter": "hf.adapter",
    "save_adapter": "hf.adapter",
    "base_hash": "hf.folder",
    "load": "hf.folder",
    "save": "hf.folder",
    "load_tokenizer": "hf.hf_tokenizer",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dms_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dms_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
