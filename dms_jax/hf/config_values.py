"""Read single keys of a foreign `config.json` with their types. A null value means the same as a missing key."""

from dms_jax.config_reader import MAX_INT
from dms_jax.errors import ConfigError, shown

MIN_FLOAT32, MAX_FLOAT32 = 1.2e-38, 3.4e38  # the range of normal numbers, rounded inwards


def whole_number(raw: dict, key: str, min: int = 1) -> int:
    """Return the whole number, at least `min`, under a required key."""
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not min <= value <= MAX_INT:
        raise ConfigError(f"`{key}` must be a whole number in [{min}, 2**31), got {shown(value)}")
    return value


def positive_number(raw: dict, key: str, default: float) -> float:
    """Return the positive finite number under a key, or the default if the key is missing."""
    value = raw.get(key)
    if value is None:
        return default
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not MIN_FLOAT32 <= value <= MAX_FLOAT32:
        raise ConfigError(f"`{key}` must be a positive number that a float32 can hold, got {shown(value)}")
    return float(value)


def flag(raw: dict, key: str) -> bool:
    """Return the bool under a key; False if it is missing.

    The string "false" is refused, because Python takes it as true.
    """
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"`{key}` must be true or false, got {shown(value)}")
    return bool(value)


def token_id(key: str, value: object) -> int | None:
    """Check and return a token id, or None for null and for -1, which old files write for "no such token"."""
    if value is None:
        return None
    if value == -1 and not isinstance(value, bool):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INT:
        raise ConfigError(f"`{key}` must be a token id, got {shown(value)}")
    return value


def token_ids(key: str, values: object) -> tuple[int, ...]:
    """Return the token ids in a value that is one id, a list of ids, or null. -1 means "no such token"."""
    ids = [] if values is None else values if isinstance(values, list) else [values]
    return tuple(value for item in ids if (value := token_id(key, item)) not in (None, -1))
