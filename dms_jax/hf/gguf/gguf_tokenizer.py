"""The tokenizer of a GGUF file, written as `tokenizer.json` and `tokenizer_config.json` of a Hugging Face folder."""

import os
from collections.abc import Iterable
from typing import Any

from dms_jax.errors import ConfigError, shown
from dms_jax.files import write_json
from dms_jax.hf.gguf.gguf_file import open_gguf

# Regular expressions that `tokenizer.ggml.pre` splits text by, from the tokenizer.json files of the original models
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def write_tokenizer(path: str, folder: str) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` from the metadata of a GGUF file, if it has a tokenizer."""
    tensors = open_gguf(path)
    fields = tensors.fields
    if "tokenizer.ggml.tokens" not in fields:
        return
    ids = {kind: tensors.token_id(kind) for kind in ("bos", "eos", "padding", "unknown")}
    tokens = _checked_vocabulary(fields, path, ids.values())
    try:
        tokenizer = build_tokenizer(fields, path)
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
    elif not _texts(merges) or not all(" " in merge for merge in merges):
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


def build_tokenizer(fields: dict, where: str):
    """Build the byte-level BPE tokenizer of a GGUF file.

    transformers can convert one, too, but it ignores `tokenizer.ggml.pre`, which decides where text is split.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == "smollm")
    first = {
        "smollm": pre_tokenizers.Digits(individual_digits=True),
        "qwen2": pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
        "deepseek-r1-qwen": pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
        "llama-bpe": pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
    }
    if kind != "gpt2" or not isinstance(split, str) or split not in first:
        raise ConfigError(
            f"{where}: tokenizer {shown(kind)} with pre-tokenizer {shown(split)} is not supported; supported: gpt2 "
            f"with {', '.join(first)}"
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=split == "llama-bpe"
        )
    )
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first[split], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for number, special in ((3, True), (4, False)):  # control tokens, user-defined tokens
        added = [token for token, kind in zip(tokens, types, strict=True) if kind == number]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer
