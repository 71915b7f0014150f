"""GGUF files: header, metadata, tensor list and tokenizer."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import oracles
from fuzz.fuzz_case import Target
from fuzz.mutations import HUGE, damage_head, replace_file, rewrite
from hf.hf_cases import GOLDEN, write_gguf

import dms_jax
from dms_jax.hf.gguf.gguf_file import INSIDE, OUTSIDE, unpermute
from dms_jax.hf.hf_weights import model_writes

FILE, SOURCE = "model.gguf", "llama_untied"
KINDS = {"I": 4, "f": 6, "?": 7, "Q": 10, "d": 12}  # struct code -> GGUF type


def make(folder: Path) -> None:
    write_gguf(folder / FILE, SOURCE, tokenizer="llama-bpe")


def mutate(rng: random.Random, folder: Path) -> str:
    path = folder / FILE
    kind = rng.random()
    if kind < 0.05:
        return replace_file(rng, path)
    if kind < 0.5:
        return rewrite(path, lambda data: change_field(rng, data))
    if kind < 0.7:
        return rewrite(path, lambda data: change_tensor(rng, data))
    return rewrite(path, lambda data: damage_head(rng, data, data_start(data)))


def data_start(data: bytes) -> int:
    """The approximate start of the tensors' bytes, shortly after the name of the last tensor."""
    return data.rfind(b".weight") + 64


def change_field(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Replace, retype, drop or duplicate one metadata value.

    The offsets of tensors are relative, so only the padding changes.
    """
    fields = spans(data)
    key = rng.choice(list(fields))
    begin, value_at, end = fields[key]
    code = rng.choice(list(KINDS))
    value = {
        "I": rng.choice([0, 1, 2, 3, 7, 33, 2**32 - 1]),
        "Q": rng.choice([0, 1, HUGE, 2**64 - 1]),
        "?": True,
        "f": rng.choice([0.0, -1.0, 0.5, float("nan"), float("inf")]),
        "d": rng.choice([1e300, -1e-300, 1e-5]),
    }[code]
    scalar = struct.pack("<I" + code, KINDS[code], value)
    text = rng.choice([b"", b"qwen3", b"\xff\xfe", b"gpt2", b"a" * 1000, b"\0"])
    new, how = rng.choice(
        [
            (scalar, f"{value!r} as {code}"),
            (scalar, f"{value!r} as {code}"),
            (struct.pack("<IQ", 8, len(text)) + text, f"text {text[:20]!r}"),
            (
                struct.pack("<IIQ", 9, rng.choice([0, 4, 8, 9, 99]), rng.choice([0, HUGE, 2**40])),
                "an array longer than the file",
            ),
            (struct.pack("<IIQ", 9, 9, 1) * 5000 + struct.pack("<IIQ", 9, 4, 0), "arrays in arrays"),
            (struct.pack("<IIQIII", 9, 4, 3, 5, 0, 2**31), "three numbers"),
            (struct.pack("<I", rng.choice([13, 99, 2**32 - 1])), "an unknown type"),
            (data[value_at:end], "the same"),
        ]
    )
    count = struct.unpack_from("<Q", data, 16)[0]
    if rng.random() < 0.1:
        return repad(data, data[:begin] + data[end:], count - 1), f"drop {key}"
    if rng.random() < 0.05:
        return repad(data, data[:end] + data[begin:], count + 1), f"duplicate {key}"
    return repad(data, data[:value_at] + new + data[end:], count), f"{key} becomes {how}"


def change_tensor(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change the name, the dimensions, the type or the offset of one tensor."""
    start = (
        data.rfind(b"token_embd.weight")
        if rng.random() < 0.3
        else data.rfind(rng.choice([b"attn_q.weight", b"ffn_down.weight", b"output_norm.weight"]))
    )
    name_end = start + data[start:].index(b"weight") + 6
    dims = struct.unpack_from("<I", data, name_end)[0]
    at = name_end + 4
    what = rng.randrange(5)
    if what == 0:
        return data[: start + 1] + b"_" + data[start + 2 :], "a tensor's name"
    if what == 1:
        return data[:name_end] + struct.pack("<I", rng.choice([0, 1, dims + 1, 5, 2**32 - 1])) + data[
            at:
        ], "the number of dimensions"
    if what == 2:
        size = rng.choice([0, 1, 2, 31, 33, HUGE, 2**63, 2**64 - 1, struct.unpack_from("<Q", data, at)[0] // 2])
        return data[:at] + struct.pack("<Q", size) + data[at + 8 :], f"a dimension of {size}"
    if what == 3:
        kind = rng.choice([0, 1, 2, 8, 12, 24, 30, 99, 2**32 - 1])
        return data[: at + 8 * dims] + struct.pack("<I", kind) + data[at + 8 * dims + 4 :], f"type {kind}"
    offset = rng.choice([0, 4, 32, HUGE, 2**64 - 32, len(data)])
    return data[: at + 8 * dims + 4] + struct.pack("<Q", offset) + data[at + 8 * dims + 12 :], f"offset {offset}"


def spans(data: bytes) -> dict[str, tuple[int, int, int]]:
    """For each metadata key, the positions of its entry, of its value, and of the end of its value."""
    at, found = 24, {}

    def skip(kind: int, at: int) -> int:
        if kind == 8:
            return at + 8 + struct.unpack_from("<Q", data, at)[0]
        if kind == 9:
            inner, count = struct.unpack_from("<IQ", data, at)
            at += 12
            for _ in range(count):
                at = skip(inner, at)
            return at
        return at + struct.calcsize("<" + oracles.GGUF_SCALARS[kind])

    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        begin, size = at, struct.unpack_from("<Q", data, at)[0]
        key, value_at = data[at + 8 : at + 8 + size].decode(), at + 8 + size
        at = skip(struct.unpack_from("<I", data, value_at)[0], value_at + 4)
        found[key] = (begin, value_at, at)
    return found


def repad(old: bytes, new: bytes, fields: int) -> bytes:
    """`new` with the right number of metadata fields and the right padding before the tensors' bytes."""
    last = old.rfind(b".weight")
    name_end = last + 7
    head = name_end + 4 + 8 * struct.unpack_from("<I", old, name_end)[0] + 12
    grown = len(new) - len(old)
    infos, body = new[: head + grown], old[-(-head // 32) * 32 :]
    infos = infos[:16] + struct.pack("<Q", fields) + infos[24:]
    return infos + bytes(-len(infos) % 32) + body


def read(folder: Path) -> Any:
    """The config, every tensor under its Hugging Face name, and an encoded and decoded text."""
    model = dms_jax.load(folder / FILE)
    tensors = {write.name: oracles.plain(write.value()) for write in model_writes(model)}
    config = model.config
    tokenizer = dms_jax.load_tokenizer(folder / FILE)
    ids = tokenizer.encode("ab b").tolist()
    return tensors | {
        "config": config,
        "ids": (ids, tokenizer.decode(ids), tokenizer.bos_id, tokenizer.eos_id, len(tokenizer)),
    }


def meant(folder: Path) -> Any:
    """Compare the config with the bytes of the file, and return the tensors and the tokenizer that those bytes mean."""
    fields, tensors = oracles.gguf(folder / FILE)
    raw = json.loads((GOLDEN / SOURCE / "config.json").read_text())
    heads, groups = (
        fields["llama.attention.head_count"],
        fields.get("llama.attention.head_count_kv", fields["llama.attention.head_count"]),
    )
    found = {}
    for name, value in tensors.items():
        *front, part, kind = name.split(".")
        hf = f"{OUTSIDE[part]}.{kind}" if not front else f"model.layers.{front[1]}.{INSIDE[part]}.{kind}"
        if part in ("attn_q", "attn_k"):
            value = unpermute(value, heads if part == "attn_q" else groups)
        found[hf] = oracles.plain(np.ascontiguousarray(value))
    seen = dms_jax.load(folder / FILE).config
    assert seen.model_type == fields["general.architecture"] == raw["model_type"]
    assert (seen.num_layers, seen.hidden_size, seen.num_q_heads) == (
        fields["llama.block_count"],
        fields["llama.embedding_length"],
        heads,
    )
    assert (seen.num_kv_heads, seen.intermediate_size) == (groups, fields["llama.feed_forward_length"])
    assert np.float32(seen.rms_norm_eps) == np.float32(fields["llama.attention.layer_norm_rms_epsilon"])
    assert np.float32(seen.rope_theta) == np.float32(fields.get("llama.rope.freq_base", 10000.0))
    assert seen.max_position_embeddings == fields["llama.context_length"]
    ids = dms_jax.load_tokenizer(folder / FILE)
    tokens = fields.get("tokenizer.ggml.tokens", [])
    text = ids.encode("ab b").tolist()
    assert all(piece in ids.inner.get_vocab() for piece in tokens)
    return found | {
        "config": seen,
        "ids": (
            text,
            "ab b",
            *(without_none(fields.get(f"tokenizer.ggml.{kind}_token_id")) for kind in ("bos", "eos")),
            len(tokens),
        ),
    }


def without_none(value: int | None) -> int | None:
    """Return None for the id that means that there is no such token."""
    return None if value == 2**32 - 1 else value


TARGETS = [Target("GGUF file", 260, make, mutate, read, meant)]
