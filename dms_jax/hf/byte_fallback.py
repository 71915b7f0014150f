"""Decode tokens that stand for single bytes, as tokenizers with byte fallback (SentencePiece) have them.

If a run of such tokens is not valid UTF-8, the library shows each of its bytes as U+FFFD. A character that is cut at
the end of an answer thus destroys the whole characters in front of it.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # a decoder shows this for bytes that do not form a character, or do not form one yet
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def whole_characters(backend: Any, ids: Sequence[int], text: str) -> str:
    """Return the text of `ids`, with U+FFFD only for the bytes that do not form a character.

    `backend` is a Tokenizer of the library `tokenizers`, and `text` is what it decodes, which is returned if it has no
    byte fallback.
    """
    decoder = backend.decoder
    if decoder is None or decoder.decode(["<0x41>"]) != "A":
        return text
    tokens = [token for id_ in ids if (token := backend.id_to_token(id_)) is not None]
    whole = []
    for is_bytes, run in itertools.groupby(tokens, lambda token: bool(BYTE.fullmatch(token))):
        if is_bytes:
            whole.append(bytes(int(token[3:5], 16) for token in run).decode("utf-8", "replace"))
        else:
            whole += run
    return decoder.decode(whole)
