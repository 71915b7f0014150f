"""Check token ids on the host, before a program that would clip the wrong ones silently."""

import jax
import numpy as np

from dms_jax.axes import Array
from dms_jax.errors import ConfigError


def check_ids(tokens: np.ndarray, vocab_size: int, where: str = "tokens") -> np.ndarray:
    """Return token ids as int32. `where` begins the message about an id that is not in the vocabulary."""
    if not np.issubdtype(tokens.dtype, np.integer):
        values = tokens.ravel()
        if np.issubdtype(tokens.dtype, np.floating):  # blame a value that is not whole, if there is one
            values = sorted(values, key=lambda value: np.isfinite(value) and value == np.floor(value))
        raise ConfigError(f"{where}: token ids must be whole numbers, got {', '.join(map(str, values[:1]))}")
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise ConfigError(f"{where}: token id {outside[0]} is outside the vocabulary (0 to {vocab_size - 1})")
    return tokens.astype(np.int32)


def checked_on_host(tokens: np.ndarray | Array, vocab_size: int) -> np.ndarray | Array:
    """Check the shape of rows [B T], and their ids if the host can read them: not those of a traced program or of other
    hosts."""
    if not isinstance(tokens, jax.Array):
        try:
            tokens = np.asarray(tokens)
        except ValueError as why:  # rows of different lengths
            raise ConfigError(f"tokens must be an array of token ids [rows, tokens]: {why}") from None
    if tokens.dtype.kind in "USO":  # a string, or something else that is not a number
        raise ConfigError(
            "tokens must be an array of token ids [rows, tokens], got text or objects; encode text with "
            "dms_jax.load_tokenizer(FOLDER).encode(TEXT)[None]"
        )
    if tokens.ndim != 2:
        way_out = "write tokens[None] for one row" if tokens.ndim == 1 else "give one row for each text"
        raise ConfigError(f"tokens must have the shape [rows, tokens], got {list(tokens.shape)}; {way_out}")
    if isinstance(tokens, jax.core.Tracer) or (isinstance(tokens, jax.Array) and not tokens.is_fully_addressable):
        return tokens
    check_ids(np.asarray(tokens), vocab_size)
    return tokens
