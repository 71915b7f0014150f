"""Decode tokens that stand for single bytes, as tokenizers with byte fallback (SentencePiece) have them.

If a run of such tokens is not valid UTF-8, the library shows each of its bytes as U+FFFD. A character that is cut at
the end of an answer thus destroys the whole characters in front of it.
"""

import itertools
import re
from typing import Any

REPLACEMENT = "\ufffd"  # a decoder shows this for bytes that do not form a character, or do not form one yet
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def whole_characters(inner: Any, ids: list[int], text: str, skip_special_tokens: bool) -> str:
    """Return the text of `ids`, with U+FFFD only for the bytes that do not form a character.

    `inner` is a tokenizer of transformers, and `text` is what it decodes, which is returned if it has no byte fallback.
    """
    decoder = getattr(getattr(inner, "backend_tokenizer", None), "decoder", None)
    if decoder is None or decoder.decode(["<0x41>"]) != "A":
        return text
    special = set(inner.all_special_ids) | {id_ for id_, token in inner.added_tokens_decoder.items() if token.special}
    kept = [id_ for id_ in ids if not (skip_special_tokens and id_ in special)]
    tokens = []
    for is_bytes, run in itertools.groupby(
        inner.convert_ids_to_tokens(kept), lambda token: bool(BYTE.fullmatch(token))
    ):
        if is_bytes:
            tokens.append(bytes(int(token[3:5], 16) for token in run).decode("utf-8", "replace"))
        else:
            tokens += run
    return decoder.decode(tokens)
