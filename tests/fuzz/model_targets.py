"""Model folders: config.json, weights in one file and in shards, tokenizers."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cases import tiny_model
from fuzz import oracles
from fuzz.fuzz_case import Target
from fuzz.mutations import HUGE, change_json, damage_head, replace_file, rewrite
from hf.hf_cases import write_tokenizer

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.hf.folder import folder_writes
from dms_jax.hf.hf_config import HANDLED, fresh_config, read_folder
from dms_jax.hf.hf_weights import model_writes

POLICY = DMSConfig(window_size=8)
SHAPE_KEYS = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
}


@cache
def small_model(dms: DMSConfig | None = POLICY):
    return tiny_model(dms, num_layers=2)


def make_folder(folder: Path, shard_bytes: int = 10**9) -> None:
    dms_jax.save(small_model(), folder, shard_bytes=shard_bytes)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.6}))


def read_weights(folder: Path) -> dict[str, Any]:
    """Every tensor, as the loaded model would write it."""
    model = dms_jax.load(folder)
    assert folder_writes(model)  # the first step of saving it again
    return {write.name: oracles.plain(write.value()) for write in model_writes(model)}


def meant_weights(folder: Path) -> dict[str, Any]:
    """The tensors in the files that the index names, or in the only file, as fp32."""
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(oracles.strict_json(index.read_bytes())["weight_map"].values()))
        if index.exists()
        else ["model.safetensors"]
    )
    assert all("/" not in name for name in files), "a file outside the folder"
    found: dict[str, np.ndarray] = {}
    for name in files:
        tensors = oracles.safetensors(folder / name)[1]
        assert not found.keys() & tensors.keys(), "duplicate tensor"
        found |= tensors
    return {
        name: oracles.plain(value.astype(np.float32)) for name, value in found.items() if not name.endswith("inv_freq")
    }


# --- config.json ---


def mutate_config(rng: random.Random, folder: Path) -> str:
    path = folder / ("generation_config.json" if rng.random() < 0.15 else "config.json")
    if rng.random() < 0.08:
        return replace_file(rng, path)
    if rng.random() < 0.4:  # a known key that is absent, which `change_json` would never add
        path = folder / "config.json"
        raw = json.loads(path.read_text())
        key = rng.choice(
            sorted(
                HANDLED
                | {"dms_tau", "dms_window_size", "dms_cr", "dms_separate_alpha", "dms_head_units"}
                | {"hidden_act", "quantization_config"}
            )
        )
        raw[key] = rng.choice(
            [
                None,
                0,
                -1,
                1,
                2,
                3,
                7,
                HUGE,
                10**400,
                1e999,
                0.5,
                "2",
                "",
                "true",
                True,
                False,
                [],
                [1],
                ["x"],
                {},
                {"rope_type": "linear"},
                {"rope_type": "llama3", "factor": "x"},
                {"rope_type": [1]},
                {"type": "linear", "factor": -1},
                float("nan"),
            ]
        )
        path.write_text(json.dumps(raw))
        return f"{key} = {str(raw[key])[:40]}"
    return rewrite(path, lambda data: change_json(rng, data))


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json that the loaded model would write, with the stop tokens and the policy apart."""
    config = dms_jax.load(folder).config
    return typed(fresh_config(config) | {"eos": config.eos_token_ids, "dms": config.dms})


def meant_config(folder: Path) -> dict[str, Any]:
    """The values in config.json, or the defaults of the family, for each key that `fresh_config` writes."""
    raw = oracles.strict_json((folder / "config.json").read_bytes())
    generation = folder / "generation_config.json"
    more = oracles.strict_json(generation.read_bytes()).get("eos_token_id") if generation.exists() else None
    wanted = fresh_config(read_folder(str(folder))[1])  # the keys of this family
    defaults = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": True,
    }
    found = {key: raw[key] if raw.get(key) is not None else defaults.get(key) for key in wanted}
    found |= {"head_dim": raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"], "use_cache": True}
    if not raw.get("num_key_value_heads"):
        found["num_key_value_heads"] = raw["num_attention_heads"]
    for key in ("rms_norm_eps", "rope_theta"):
        found[key] = float(found[key])
    rope = (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    found["rope_theta"] = float(rope.pop("rope_theta", found["rope_theta"]))
    found["rope_scaling"] = (
        None if kind == "default" else {"rope_type": kind, **{key: float(value) for key, value in rope.items()}}
    )
    if kind == "llama3":
        found["rope_scaling"]["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    as_list = lambda ids: [] if ids is None else ids if isinstance(ids, list) else [ids]
    own = as_list(raw.get("eos_token_id"))
    eos = list(dict.fromkeys(own + as_list(more)))
    found["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
    dms = {
        "window_size": raw.get("dms_window_size", 512),
        "target_cr": float(raw.get("dms_cr", 8)),
        "tau": float(raw.get("dms_tau", 0.1)),
        "evict_logit_scale": float(raw.get("dms_alpha_scale", 100)),
        "evict_logit_bias": float(raw.get("dms_initial_alpha_offset", 5)),
        "granularity": raw.get("dms_alpha_per", "head"),
        "decision_shift": raw.get("dms_decision_shift", 1),
        "zero_borrowed": raw.get("dms_zero_mode", "pre+post"),
        "head_units": raw.get("dms_head_units", 0),
        "variant": "projection" if raw.get("dms_separate_alpha") else "borrowed",
    }
    return typed(found | {"eos": tuple(eos), "dms": DMSConfig(**dms)})


def typed(values: dict) -> dict:
    """The values with their types, because 1, 1.0 and True are equal to Python."""
    return {key: (type(value).__name__, value) for key, value in values.items()}


# --- weights ---


def mutate_weights(rng: random.Random, folder: Path) -> str:
    path = folder / "model.safetensors"
    kind = rng.random()
    if kind < 0.08:
        return replace_file(rng, path)
    if kind < 0.6:
        return rewrite(path, lambda data: change_header(rng, data))
    return rewrite(path, lambda data: damage_head(rng, data, 8 + int.from_bytes(data[:8], "little")))


def wrong_shapes(shape: list[int]) -> list:
    count = int(np.prod(shape))
    wrong = [[HUGE], [-1], "x", [0], [HUGE, HUGE], [*shape[:-1], 1.0]]
    return [shape[::-1], [*shape, 1], [1, *shape], [count], [], *wrong]


def wrong_offsets(begin: int, end: int) -> list:
    outside = [[0, HUGE], [end, begin], [begin, end - 4], [begin + 4, end], [-4, end]]
    return [*outside, [0, 0], [begin], None, [begin, 2**64]]


def change_header(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change a safetensors header as JSON: retype, reshape, rename, move, drop or duplicate one tensor."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry, body, how = header[name], data[8 + size :], rng.randrange(12)
    begin, end = entry["data_offsets"]
    if how == 0:
        entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "f32", "Q4", None, 3])
    elif how == 1:
        entry["shape"] = rng.choice(wrong_shapes(entry["shape"]))
    elif how == 2:
        entry["data_offsets"] = rng.choice(wrong_offsets(begin, end))
    elif how == 3:
        header[name]["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], [begin, end]
    elif how == 4:
        header[name], header[other] = header[other], header[name]
    elif how == 5:
        del header[name]
    elif how == 6:
        header[rng.choice([name + "x", name.upper(), name.replace("0", "9"), "", "../" + name, "\ud800"])] = header.pop(
            name
        )
    elif how == 7:  # a valid file with one tensor in fp16, which is harmless for weights
        tensor = np.frombuffer(body[begin:end], np.float32).astype(np.float16).tobytes()
        body = body[:begin] + tensor + body[end:]
        for item in names:
            a, b = header[item]["data_offsets"]
            header[item]["data_offsets"] = [a - len(tensor) * (a >= end), b - len(tensor) * (b >= end)]
        entry["dtype"] = "F16"
    elif how == 8:  # a valid file with an extra tensor
        header["extra.weight"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(body), len(body) + 8]}
        body += bytes(8)
    elif how == 9:
        body = body[: -rng.choice([1, 4, 100, len(body) // 2, len(body)])]
    elif how == 10:
        changed, text = change_json(rng, json.dumps(header).encode())
        return len(changed).to_bytes(8, "little") + changed + body, f"header: {text}"
    else:
        header.pop("__metadata__", None)
        header["__metadata__"] = rng.choice([{"format": "tf"}, {}, {"format": 3}, [], {"x": "y" * 100_000}])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body, f"header change {how} of {name}"


def mutate_shards(rng: random.Random, folder: Path) -> str:
    shards = sorted(folder.glob("model-*.safetensors"))
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    kind, one, other = rng.randrange(10), rng.choice(shards), rng.choice(shards)
    if kind == 0:
        return replace_file(rng, rng.choice([one, index]))
    if kind == 1:
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        return f"{one.name} and {other.name} exchanged"
    if kind == 2:
        one.write_bytes(other.read_bytes())
        return f"{one.name} is a copy of {other.name}"
    if kind == 3:
        return rewrite(one, lambda data: change_header(rng, data))
    if kind == 4:
        return rewrite(one, lambda data: damage_head(rng, data, 8 + int.from_bytes(data[:8], "little")))
    if kind < 7:
        name = rng.choice(list(raw["weight_map"]))
        outside = folder.parent / "outside.safetensors"
        value = rng.choice(
            [
                f"../{outside.name}",
                str(outside),
                f"./{one.name}",
                "",
                ".",
                "..",
                None,
                3,
                [one.name],
                "x\0",
                "\ud800",
                other.name,
                "config.json",
            ]
        )
        raw["weight_map"][name] = value
        if kind == 6:
            raw["weight_map"] = dict.fromkeys(raw["weight_map"], value)
        index.write_text(json.dumps(raw))
        return f"weight_map has {value!r}"
    return rewrite(index, lambda data: change_json(rng, data))


# --- tokenizer ---


def make_tokenizer(folder: Path) -> None:
    write_tokenizer(folder)


def mutate_tokenizer(rng: random.Random, folder: Path) -> str:
    path = folder / rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    return replace_file(rng, path) if rng.random() < 0.1 else rewrite(path, lambda data: change_json(rng, data))


def read_tokenizer(folder: Path) -> Any:
    tokenizer = dms_jax.load_tokenizer(folder)
    ids = tokenizer.encode("hello world, reply hello")
    hash_, ends, text = tokenizer.hash, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos), tokenizer.decode(ids)
    if tokenizer.has_chat_template:
        tokenizer.encode_chat([{"role": "user", "content": "hello"}], reply=True)
    return ids.tolist(), ends, text, len(hash_), len(tokenizer) > 0


def meant_tokenizer(folder: Path) -> Any:
    """What tokenizer.json says, read by the library `tokenizers` alone, with the names in tokenizer_config.json."""
    from tokenizers import Tokenizer

    rules = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rules.no_truncation()
    rules.no_padding()
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    named = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(name)
        token = token["content"] if isinstance(token, dict) else token
        named[name] = None if token is None else rules.token_to_id(token)
    ids = rules.encode("hello world, reply hello", add_special_tokens=False).ids
    bos = named["bos_token"]
    begins = bos is not None and rules.encode("a").ids[:1] == [bos]
    hidden = {*named.values(), *(id_ for id_, t in rules.get_added_tokens_decoder().items() if t.special)}
    text = rules.decode([id_ for id_ in ids if id_ not in hidden], skip_special_tokens=False)
    return ids, (bos, named["eos_token"], begins), text, 64, True


TARGETS = [
    Target("model config.json", 250, make_folder, mutate_config, read_config, meant_config),
    Target("model weights", 250, make_folder, mutate_weights, read_weights, meant_weights),
    Target(
        "model shards and index",
        160,
        lambda folder: make_folder(folder, 20_000),
        mutate_shards,
        read_weights,
        meant_weights,
    ),
    Target("tokenizer", 150, make_tokenizer, mutate_tokenizer, read_tokenizer, meant_tokenizer),
]
