"""The BPE model of a SentencePiece tokenizer, whose file has scores instead of merges (Llama 2, Mistral, TinyLlama).

SentencePiece joins the neighbors whose joint piece has the highest score. A list of merges in the order of the scores
does the same; transformers converts such tokenizers in this way, too (`SentencePieceExtractor`).
"""

import math
from typing import Any

from dms_jax.errors import ConfigError

SPACE = "\u2581"  # SentencePiece's mark of a space
PIECES = (1, 4, 5)  # token types that a merge may produce: normal, user-defined, unused


def build_sentencepiece(fields: dict[str, Any], unknown: int | None, where: str):
    """Build the tokenizer, without its added tokens, of checked `tokens` and `token_type`."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not all(_finite(score) for score in scores):
        raise ConfigError(f"{where}: its tokenizer is damaged: scores must be one finite number per token")
    unknown = next((i for i, kind in enumerate(types) if kind == 2), None) if unknown is None else unknown
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges(tokens, types, scores),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that join to a piece, the highest score first."""
    ids = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in PIECES}
    pairs = [
        (-scores[i], ids[token[:cut]], ids[token[cut:]], (token[:cut], token[cut:]))
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [pair for *_, pair in sorted(pairs)]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
