"""Tokenizers of GGUF files that have scores instead of merges, compared with SentencePiece's own rule."""

import random

import pytest

from dms_jax.errors import ConfigError
from dms_jax.hf.gguf.gguf_tokenizer import _check_keys, build_tokenizer

SPACE = "\u2581"
WORDS = ["ab", "abc", "bc", "cab", "aa", "aab", "ba", SPACE + "a", SPACE + "ab", SPACE + "abc", SPACE * 2, "ca"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, SPACE, "a", "b", "c"]
TYPES = [2, 3, 3] + [6] * 256 + [1] * (len(WORDS) + 4)
SCORES = [0.0] * 259 + [-float(i) for i in range(len(WORDS) + 4)]
IDS = {"bos": 1, "eos": 2, "padding": None, "unknown": 0}
FIELDS = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.scores": SCORES,
}


def sentencepiece_ids(text, prefix=True):
    """Join the two neighbors whose joint piece has the highest score, the leftmost first, until none is a piece."""
    ids = {token: i for i, token in enumerate(TOKENS)}
    symbols = list((SPACE if prefix and text else "") + text.replace(" ", SPACE))
    while True:
        joint = [
            (-SCORES[ids[left + right]], at)
            for at, (left, right) in enumerate(zip(symbols, symbols[1:], strict=False))
            if left + right in ids
        ]
        if not joint:
            break
        _, at = min(joint)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    pieces = [[ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols]
    return [i for piece in pieces for i in piece]


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_sentencepiece(prefix):
    tokenizer = build_tokenizer(FIELDS | {"tokenizer.ggml.add_space_prefix": prefix}, "m.gguf", IDS)
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("aabbcc  é\n") for _ in range(rng.randrange(1, 14)))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == sentencepiece_ids(text, prefix), text
        assert tokenizer.decode(ids) == text


def test_begin_and_end_tokens_follow_the_file():
    encode = lambda **more: (
        build_tokenizer(FIELDS | {f"tokenizer.ggml.{key}": value for key, value in more.items()}, "m.gguf", IDS)
        .encode("ab")
        .ids
    )
    word = sentencepiece_ids("ab")
    assert encode() == [1, *word] and encode(add_bos_token=False) == word
    assert encode(add_eos_token=True) == [1, *word, 2]


@pytest.mark.parametrize("scores", [None, [0.0], [float("nan")] * len(TOKENS)])
def test_scores_must_be_one_number_per_token(scores):
    with pytest.raises(ConfigError, match="one finite number per token"):
        build_tokenizer(FIELDS | {"tokenizer.ggml.scores": scores}, "m.gguf", IDS)


def test_unknown_kinds_and_settings_are_refused_by_name():
    with pytest.raises(ConfigError, match="tokenizer 't5' is not supported"):
        _check_keys(FIELDS | {"tokenizer.ggml.model": "t5"}, "m.gguf")
    for key, value in (("remove_extra_whitespaces", True), ("precompiled_charsmap", [1, 2]), ("unheard_of", 3)):
        with pytest.raises(ConfigError, match=key):
            _check_keys(FIELDS | {f"tokenizer.ggml.{key}": value}, "m.gguf")
        _check_keys(FIELDS | {f"tokenizer.ggml.{key}": type(value)()}, "m.gguf")
