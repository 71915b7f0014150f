"""Tiny tokenizers of both kinds, written as folders with the published structure: byte-level BPE, and SentencePiece
with byte fallback. Every character of ASCII is a token of its own."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

import dms_jax

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level(folder: Path, special=CHATML_TOKENS, merges=(), **settings):
    """Write a byte-level BPE tokenizer of 256 bytes, the results of `merges` and the special tokens; load it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Backend(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return _written(backend, folder, special, {"eos_token": special[-1]} | settings)


def sentence_piece(folder: Path, special=("<unk>", "<s>", "</s>"), **settings):
    """Write a tokenizer like that of Llama 2: a space is "▁", one is put in front, and bytes are the fallback."""
    letters = "▁" + "".join(map(chr, range(33, 127)))
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _written(backend, folder, special, names | {"add_bos": True} | settings)


def _written(backend: Backend, folder: Path, special, settings: dict):
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if settings.pop("add_bos", False):
        begin = settings["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"], special_tokens=[(begin, backend.token_to_id(begin))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    common = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(common | settings))
    return dms_jax.load_tokenizer(folder)


def spelled(tokenizer, ids) -> str:
    """Return the tokens of ids next to each other, control tokens included."""
    return "".join(tokenizer.inner.convert_ids_to_tokens([int(i) for i in ids]))
