"""Where a row ends: the ids that end a text, and stop strings that are special tokens.

Errors are `ConfigError`.
"""

import json
from typing import Any

from dms_jax.config import ModelConfig
from dms_jax.errors import ConfigError
from dms_jax.hf.config_values import token_ids
from dms_jax.hf.hf_tokenizer import Tokenizer
from dms_jax.models.decoder import Decoder


def end_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Return the ids that end a text by default.

    They are those of config.json, generation_config.json or the GGUF file, and the end of text of the tokenizer.
    Chat fine-tunes often name the end of a turn in only one of them.
    """
    own = None if tokenizer is None else tokenizer.eos_id
    more = () if own is None or own >= config.vocab_size else (own,)  # the model cannot generate a larger id
    return tuple(dict.fromkeys(config.eos_token_ids + more))


def split_stops(stops: tuple[str, ...], tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the ids of the stop strings that are special tokens, and the other stop strings.

    The text of an answer contains no special tokens, so a search in the text would never find one. Raises ConfigError
    for a stop string that consists of a special token and other text.
    """
    special = tokenizer.special_ids if stops and tokenizer is not None else {}
    for stop in stops:
        if stop not in special and (inside := [token for token in special if token and token in stop]):
            raise ConfigError(
                f"stop string {stop!r} contains the special token {inside[0]!r}, which never appears in the text of an "
                f"answer; give {inside[0]!r} alone to stop there"
            )
    return tuple(special[stop] for stop in stops if stop in special), tuple(s for s in stops if s not in special)


def origins(model: Decoder, tokenizer: Tokenizer) -> dict[int, str]:
    """Return the file that each of `end_ids` comes from, for messages."""
    source: Any = getattr(model, "source", None)
    text = None if source is None else source.config_json
    in_config = () if text is None else token_ids("eos_token_id", json.loads(text).get("eos_token_id"))
    other = "the GGUF file" if source is not None and text is None else "generation_config.json"
    found = {id_: "config.json" if id_ in in_config else other for id_ in model.config.eos_token_ids}
    return {id_: found.get(id_, "the tokenizer") for id_ in end_ids(model.config, tokenizer)}
