"""The tokenizer of a GGUF file, written as `tokenizer.json` and `tokenizer_config.json` of a Hugging Face folder."""

import os
from collections.abc import Iterable
from typing import Any

from dms_jax.errors import ConfigError, shown
from dms_jax.files import write_json
from dms_jax.hf.gguf.gguf_file import open_gguf
from dms_jax.hf.gguf.gguf_sentencepiece import build_sentencepiece

# Regular expressions that `tokenizer.ggml.pre` splits text by, from the tokenizer.json files of the original models
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names that llama.cpp gives the same rules -> the name used here
SAME_SPLIT = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "starcoder": "smollm", "phi-2": "gpt-2"}
# Keys that are read here or do not change ids, besides those of special tokens
HARMLESS_KEYS = frozenset(
    [
        "model",
        "pre",
        "tokens",
        "token_type",
        "token_type_count",
        "scores",
        "merges",
        "add_bos_token",
        "add_eos_token",
        "add_space_prefix",
    ]
)


def write_tokenizer(path: str, folder: str) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` from the metadata of a GGUF file, if it has a tokenizer."""
    tensors = open_gguf(path)
    fields = tensors.fields
    if "tokenizer.ggml.tokens" not in fields:
        return
    _check_keys(fields, path)
    ids = {kind: tensors.token_id(kind) for kind in ("bos", "eos", "padding", "unknown")}
    tokens = _checked_vocabulary(fields, path, ids.values())
    try:
        tokenizer = build_tokenizer(fields, path, ids)
    except ConfigError:
        raise
    except Exception as why:  # the library raises plain Exceptions
        raise ConfigError(f"{path}: cannot build a tokenizer from its vocabulary: {why}") from why
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": tensors.config.max_position_embeddings,
    }
    for name, kind in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        if (token := ids[kind]) is not None:
            settings[name] = tokens[token]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    write_json(os.path.join(folder, "tokenizer_config.json"), settings, indent=1)


def _check_keys(fields: dict, where: str) -> None:
    """Refuse unknown kinds of tokenizers by name, and settings that would change ids."""
    model = fields.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ConfigError(f"{where}: tokenizer {shown(model)} is not supported; supported: gpt2 and llama")
    for key, value in fields.items():
        name = key.removeprefix("tokenizer.ggml.")
        if name == key or name in HARMLESS_KEYS or name.endswith("_token_id") or value in (False, "", []):
            continue
        raise ConfigError(
            f"{where}: {shown(key)} = {shown(value)} is not supported, because it may change token ids; use the "
            "tokenizer of the Hugging Face folder"
        )
    for key in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if not isinstance(value := fields.get(f"tokenizer.ggml.{key}", False), bool):
            raise ConfigError(f"{where}: tokenizer.ggml.{key} must be true or false, got {shown(value)}")


def _checked_vocabulary(fields: dict, where: str, ids: Iterable[int | None]) -> list[str]:
    """Check the vocabulary and return its tokens: distinct texts, one type each, merges of two, special ids in
    range."""
    found: list[Any] = [fields.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")]
    tokens, types, merges = found
    if not _texts(tokens):
        wrong = "tokens must be a list of strings"
    elif len(set(tokens)) != len(tokens):
        wrong = "duplicate token"
    elif not isinstance(types, list) or len(types) != len(tokens):
        wrong = "token_type must be one number per token"
    elif fields["tokenizer.ggml.model"] == "gpt2" and (not _texts(merges) or not all(" " in merge for merge in merges)):
        wrong = "merges must be a list of pairs"
    elif any(i is not None and i >= len(tokens) for i in ids):
        wrong = "the id of a special token is outside the vocabulary"
    elif not isinstance(fields.get("tokenizer.chat_template", ""), str):
        wrong = "chat_template must be a string"
    else:
        return tokens
    raise ConfigError(f"{where}: its tokenizer is damaged: {wrong}")


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def build_tokenizer(fields: dict, where: str, ids: dict[str, int | None]):
    """Build the tokenizer of a GGUF file; `ids` are those of its special tokens.

    transformers can convert one, too, but it ignores `tokenizer.ggml.pre`, which decides where text is split.
    """
    from tokenizers import AddedToken, processors

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    if fields["tokenizer.ggml.model"] == "llama":
        tokenizer, adds_bos = build_sentencepiece(fields, ids["unknown"], where), True
        special_types = (2, 3)
    else:
        tokenizer, adds_bos = _byte_level(fields, where)
        special_types = (3,)
    for numbers, special in ((special_types, True), ((4,), False)):  # unknown and control tokens; user-defined tokens
        added = [token for token, kind in zip(tokens, types, strict=True) if kind in numbers]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    front = [ids["bos"]] if fields.get("tokenizer.ggml.add_bos_token", adds_bos) else []
    back = [ids["eos"]] if fields.get("tokenizer.ggml.add_eos_token", False) else []
    front, back = ([i for i in side if i is not None] for side in (front, back))
    if front or back:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(tokens[i] for i in front), "$A", *(tokens[i] for i in back)],
            special_tokens=[(tokens[i], i) for i in dict.fromkeys(front + back)],
        )
    return tokenizer


def _byte_level(fields: dict, where: str):
    """Build a byte-level BPE tokenizer; return it and whether it puts bos in front if the file does not say."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    named = fields.get("tokenizer.ggml.pre")
    split = SAME_SPLIT.get(named, named) if isinstance(named, str) else named
    digits = {"smollm": [pre_tokenizers.Digits(individual_digits=True)], "gpt-2": []}
    patterns = {
        "qwen2": QWEN2_SPLIT,
        "deepseek-r1-qwen": QWEN2_SPLIT,
        "llama-bpe": LLAMA3_SPLIT,
        "tekken": TEKKEN_SPLIT,
    }
    if not isinstance(split, str) or split not in (*digits, *patterns):
        raise ConfigError(
            f"{where}: tokenizer 'gpt2' with pre-tokenizer {shown(named)} is not supported; supported: "
            f"{', '.join([*digits, *patterns, *SAME_SPLIT])}"
        )
    first = digits[split] if split in digits else [pre_tokenizers.Split(Regex(patterns[split]), "isolated")]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    adds_bos = split in ("llama-bpe", "tekken")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=adds_bos))
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in digits)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, adds_bos
