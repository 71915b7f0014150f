"""Translate DMSConfig to the `dms_*` keys that NVIDIA released and back, and read the metadata of FastDMS.

Begin with `dms_config` and `dms_keys`, which are inverses of each other.
"""

import os

from dms_jax.config import DMSConfig
from dms_jax.config_reader import build
from dms_jax.errors import ConfigError
from dms_jax.files import read_json
from dms_jax.hf.config_values import flag
from dms_jax.hf.folder_files import member

# DMSConfig field -> (key in config.json, default of the key in Model-Optimizer's Qwen3ConfigDMS)
DMS_KEYS = {
    "window_size": ("dms_window_size", 512),
    "target_cr": ("dms_cr", 8.0),
    "tau": ("dms_tau", 0.1),
    "evict_logit_scale": ("dms_alpha_scale", 100.0),
    "evict_logit_bias": ("dms_initial_alpha_offset", 5.0),
    "granularity": ("dms_alpha_per", "head"),
    "decision_shift": ("dms_decision_shift", 1),
    "zero_borrowed": ("dms_zero_mode", "pre+post"),
    "head_units": ("dms_head_units", 0),  # our own: Model-Optimizer has linear heads only
}
SEPARATE = "dms_separate_alpha"  # true: a projection of its own; false: the borrowed query channel
# FastDMS trains token t to decide about pair t, and keeps the borrowed channel in the attention scores.
FASTDMS_DEFAULTS = {"window_size": 256, "decision_shift": 0, "zero_borrowed": "none"}
FASTDMS_SPELLINGS = {
    "window_size": ("window_size",),
    "target_cr": ("target_cr",),
    "tau": ("tau",),
    "evict_logit_scale": ("alpha_scale",),
    "evict_logit_bias": ("alpha_offset", "dms_alpha_offset"),
}
FASTDMS_HINTS = {name for names in FASTDMS_SPELLINGS.values() for name in names}
FASTDMS_KEYS = FASTDMS_HINTS | {"context_len", "compression_mode"}  # the last two have no effect
FASTDMS_MARKS = {"target_cr", "alpha_scale", "alpha_offset", "dms_alpha_offset", "compression_mode"}
READ_KEYS = {SEPARATE, *(key for key, _ in DMS_KEYS.values())}


def dms_config(raw: dict, fastdms: dict | None = None) -> DMSConfig | None:
    """Return the DMSConfig that a `config.json` declares, or None.

    An explicit `dms_*` key wins, then the metadata of FastDMS, then the defaults of the code that wrote the folder.
    """
    raw = {key: value for key, value in raw.items() if value is not None}
    written = {key for key in raw if key.startswith("dms_")}
    if fastdms is None and is_fastdms(raw):
        fastdms = raw
    if not written and fastdms is None:
        return None
    values = {field: default for field, (_, default) in DMS_KEYS.items()}
    if fastdms is not None:
        values |= FASTDMS_DEFAULTS
        for field, (key, _) in DMS_KEYS.items():
            for name in (*FASTDMS_SPELLINGS.get(field, ()), key):  # the last one found wins: the explicit key
                values[field] = fastdms.get(name, values[field])
    values |= {field: raw[key] for field, (key, _) in DMS_KEYS.items() if key in raw}
    values["variant"] = "projection" if flag(raw, SEPARATE) else "borrowed"
    try:
        return build(DMSConfig, values)
    except ConfigError as why:
        text = str(why)
        for field, (key, _) in DMS_KEYS.items():
            text = text.replace(f"`{field}`", f"`{key}`").replace(f"dms.{field} ", f"{key} ")
        raise ConfigError(text) from why


def dms_keys(dms: DMSConfig) -> dict:
    """Return all `dms_*` keys of a DMSConfig. `dms_config` reads them back to an equal one.

    `dms_head_units` is left out at 0, so that linear heads have the keys of Model-Optimizer.
    """
    keys = {SEPARATE: dms.variant == "projection"}
    keys |= {
        key: getattr(dms, field) for field, (key, _) in DMS_KEYS.items() if field != "head_units" or dms.head_units
    }
    # Other readers expect an int in `dms_cr` if the ratio is a whole number.
    return keys | {"dms_cr": int(dms.target_cr) if dms.target_cr == int(dms.target_cr) else dms.target_cr}


def is_fastdms(raw: dict) -> bool:
    """Whether a file has a key that only FastDMS writes. `tau` or `window_size` alone may be another tool's."""
    return any(raw.get(key) is not None for key in FASTDMS_MARKS)


def fastdms_metadata(folder: str, raw: dict) -> tuple[dict | None, str]:
    """Return the metadata that FastDMS keeps beside the weights of a folder, or None, and the file it came from.

    The file is `dms_metadata.json`. FastDMS also reads `training_log.json` one level up, where a file of that name may
    be another tool's. It is read only if `raw`, the folder's `config.json`, has a key of FastDMS and no `dms_*` key.
    """
    if os.path.lexists(os.path.join(folder, "dms_metadata.json")):
        beside = read_json(member(folder, "dms_metadata.json"))
        return (beside["config"] if isinstance(beside.get("config"), dict) else beside), "dms_metadata.json"
    above = os.path.join(os.path.dirname(os.path.abspath(folder)), "training_log.json")
    if is_fastdms(raw) and not any(key.startswith("dms_") for key in raw) and os.path.exists(above):
        config = read_json(above).get("config")
        if isinstance(config, dict) and is_fastdms(config):
            return config | {key: raw[key] for key in FASTDMS_KEYS & raw.keys()}, "../training_log.json"
    return None, "config.json"
