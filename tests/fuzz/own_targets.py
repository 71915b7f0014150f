"""Files in formats of this project: adapters, caches, token caches, tuned block sizes, metrics, results."""

import contextlib
import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from fuzz import oracles
from fuzz.fuzz_case import Target
from fuzz.model_targets import change_header, small_model
from fuzz.mutations import change_json, change_value, damage, damage_head, nested, odd_value, replace_file, rewrite
from synthetic_results import records, write

import dms_jax
from dms_jax.evaluation import aggregate as report_data
from dms_jax.evaluation.result_records import record_of
from dms_jax.hf.hf_weights import EVICT, model_writes
from dms_jax.kernels.block_sizes import SlotBlocks, TrainBlocks
from dms_jax.kernels.kernel_table import KERNELS
from dms_jax.kernels.tuned import TunedEntry, read_tuned, write_tuned
from dms_jax.training.data.token_store import DataConfig, tokenize
from dms_jax.training.metrics import MetricsFile, read_steps

ADAPTER, CACHE, TUNED, METRICS, RESULTS = (
    "policy.safetensors",
    "prompt.cache",
    "tuned.json",
    "metrics.jsonl",
    "results.jsonl",
)


# --- adapters and caches: safetensors with metadata ---


def mutate_tensors(name: str):
    def mutate(rng: random.Random, folder: Path) -> str:
        path, kind = folder / name, rng.random()
        if kind < 0.06:
            return replace_file(rng, path)
        if kind < 0.35:
            return rewrite(path, lambda data: change_metadata(rng, data))
        if kind < 0.7:
            return rewrite(path, lambda data: change_header(rng, data))
        return rewrite(path, lambda data: damage_head(rng, data, 8 + int.from_bytes(data[:8], "little")))

    return mutate


def change_metadata(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Drop or damage one string of the metadata, or change a value in it if it is JSON."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header["__metadata__"]
    key = rng.choice(list(metadata))
    old, kind = metadata[key], rng.randrange(6)
    if kind == 0:
        del metadata[key]
    elif kind == 1:
        metadata[key] = rng.choice(
            [
                "",
                "{",
                "null",
                "[]",
                "{}",
                "x" * 5000,
                "\ud800",
                "\0",
                old.upper(),
                old[::-1],
                "[" * 5000,
                "9" * 5000,
                '{"name": "tova"}',
                '{"name": "tova", "budget": "x"}',
                '{"name": []}',
                '{"name": "prompt"}',
            ]
        )
    elif kind == 2:
        metadata[rng.choice(["x", "content_sha256", "kind"])] = "y"
    else:
        changed, how = change_json(rng, old.encode()) if old.startswith("{") else damage(rng, old.encode())
        metadata[key] = changed.decode("latin-1")
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[
        8 + size :
    ], f"header's {key} becomes {metadata.get(key, 'absent')[:60]!r}"


def make_adapter(folder: Path) -> None:
    dms_jax.save_adapter(small_model(), folder / ADAPTER)


def read_adapter(folder: Path) -> Any:
    adapted = dms_jax.load_adapter(small_model(), folder / ADAPTER)
    return adapted.config, {
        write.name: oracles.plain(write.value()) for write in model_writes(adapted) if EVICT in write.name
    }


@cache
def filled_cache(policy: str | None, rows: int):
    ids = np.arange(20 * rows, dtype=np.int32).reshape(rows, 20) % 97
    return dms_jax.prefill(
        small_model(), dms_jax.init_cache(small_model(), rows, 24, policy=policy), ids, [20, 9][:rows]
    )[1]


def make_cache(policy: str | None, rows: int):
    return lambda folder: dms_jax.save_cache(small_model(), filled_cache(policy, rows), folder / CACHE)


def read_cache(folder: Path) -> Any:
    loaded = dms_jax.load_cache(small_model(), folder / CACHE)
    return loaded.policy, loaded.overflow, oracles.plain(jax.tree.leaves(loaded))


# --- the cache of tokens ---


def make_tokens(folder: Path) -> None:
    np.save(folder / "ids.npy", np.arange(300, dtype=np.int32).reshape(3, 100) % 97)
    read_tokens_in(folder)


def read_tokens_in(folder: Path) -> Any:
    store = tokenize((str(folder / "ids.npy"),), DataConfig(cache_dir=str(folder / "cache")), None, 97)
    return oracles.plain(store[:4])


def mutate_tokens(rng: random.Random, folder: Path) -> str:
    files = sorted((folder / "cache" / "tokens").glob("*/*"))
    path = rng.choice([*files, files[0].parent] if rng.random() < 0.2 else files)
    if path.is_dir():
        shutil.rmtree(path)
        rng.choice(
            [lambda: None, lambda: path.write_text("x"), lambda: path.mkdir(), lambda: path.symlink_to("nothing")]
        )()
        return "the entry itself"
    if rng.random() < 0.15:
        return replace_file(rng, path)
    return rewrite(path, lambda data: change_json(rng, data) if path.name == "meta.json" else damage(rng, data))


def read_tokens(folder: Path) -> Any:
    """Read from a copy, because a damaged entry is rebuilt."""
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copytree(folder, Path(temporary, "copy"), symlinks=True)
        return read_tokens_in(Path(temporary, "copy"))


# --- tuned block sizes ---

ENTRY = TunedEntry(
    "train_attention",
    "mosaic_gpu",
    "NVIDIA H200",
    128,
    "bfloat16",
    TrainBlocks(128, 64, 3),
    1.5,
    0.01,
    "2026-08-01",
    "0.10.2",
)


def make_tuned(folder: Path) -> None:
    slots = ENTRY._replace(kernel="decode_attention", blocks=SlotBlocks(64, 128, 0, 4))
    write_tuned(folder / TUNED, (ENTRY, slots, ENTRY._replace(kernel="decode_update", blocks=None)))


def mutate_tuned(rng: random.Random, folder: Path) -> str:
    if rng.random() < 0.05:
        return replace_file(rng, folder / TUNED)
    if rng.random() < 0.6:
        raw = json.loads((folder / TUNED).read_text())
        how = change_value(rng, raw)
        (folder / TUNED).write_text(json.dumps(raw))
        return how
    return rewrite(folder / TUNED, lambda data: change_json(rng, data))


def meant_tuned(folder: Path) -> Any:
    """The fields in the file, each of the right type."""
    raw = oracles.strict_json((folder / TUNED).read_bytes())
    kinds = {"head_dim": int, "speed_to_xla": float, "max_error": float}
    for entry in raw:
        assert entry["kernel"] in KERNELS
        assert set(entry) == set(ENTRY._fields)
        for key, value in entry.items():
            wanted = kinds.get(key, str) if key != "blocks" else (dict, type(None))
            assert isinstance(value, wanted) and value == value, key
        assert all(type(size) is int and size >= 0 for size in (entry["blocks"] or {}).values())
    return tuple(
        tuple(entry[key] if key != "blocks" else entry[key] and tuple(entry[key].values()) for key in ENTRY._fields)
        for entry in raw
    )


def read_tuned_file(folder: Path) -> Any:
    return tuple(
        tuple(entry._replace(blocks=entry.blocks and tuple(entry.blocks))) for entry in read_tuned(folder / TUNED)
    )


# --- metrics of a run, when it is resumed ---


def make_metrics(folder: Path) -> None:
    lines = [{"header": {}, "config": {}}, *({"step": step, "loss/total": 1.0 / (step + 1)} for step in range(12))]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def mutate_lines(name: str, broken: list[str]):
    """Change, duplicate, move or replace one line of a JSONL file."""

    def mutate(rng: random.Random, folder: Path) -> str:
        path, kind = folder / name, rng.randrange(12)
        if kind == 0:
            return replace_file(rng, path)
        if kind < 4:
            return rewrite(path, lambda data: damage(rng, data))
        lines = path.read_text().splitlines()
        at = rng.randrange(len(lines))
        if kind < 8:
            record = json.loads(lines[at])
            how = change_value(rng, record)
            lines[at] = json.dumps(record)
        elif kind == 8:
            lines.insert(rng.randrange(len(lines)), lines[at])
            how = "duplicate"
        elif kind == 9:
            del lines[at]
            how = "removed"
        else:
            lines[at] = rng.choice(
                [
                    *broken,
                    json.dumps(nested(2)),
                    json.dumps(odd_value(rng)),
                    "[" * 50_000,
                    "9" * 5000,
                    "x" * 200_000,
                    lines[at][:-1],
                    lines[at][1:],
                    "null",
                    "3",
                    '"x"',
                    "{}",
                    "",
                    " ",
                    "\0",
                    "{" + '"a": 1, "a": 2, ' + lines[at][1:],
                ]
            )
            how = f"becomes {lines[at][:40]!r}"
        path.write_bytes(
            ("\n".join(lines) + rng.choice(["\n", "\n", "\n", "", "\n\n"])).encode("utf-8", "surrogatepass")
        )
        return f"line {at + 1}: {how}"

    return mutate


def read_metrics(folder: Path) -> Any:
    """The steps of a run that is resumed at step 6, from a copy, because resuming rewrites the file."""
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copytree(folder, Path(temporary, "copy"), symlinks=True)
        path = Path(temporary, "copy", METRICS)
        MetricsFile(path).begin({"header": {}}, 6)
        return repr([(line["step"], line["loss/total"]) for line in read_steps(path)])


def meant_metrics(folder: Path) -> Any:
    found = []
    for line in (folder / METRICS).read_bytes().split(b"\n") if (folder / METRICS).is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(record, dict)
            and "loss/total" in record
            and type(record.get("step")) in (int, float)
            and record["step"] < 6
        ):
            found.append((record["step"], record["loss/total"]))
    return repr(found)


# --- results that a report reads ---


def make_results(folder: Path) -> None:
    chosen = [
        r
        for r in records(length=64, rows=2, repeats=1, layers=2, heads=2, policies=("dms", "tova"))
        if r["task"] != "kept"
    ][::7]
    kept = {
        "task": "kept",
        "policy": "dms",
        "budget": "cr4",
        "unit": "prose/0",
        "domain": "prose",
        "pieces": ["a", "b"],
        "kept": [1.0, 0.5],
        "live_per_head": [[1.0, 2.0]],
        "live_by_position": [1.0, 1.5],
        "length": 2,
        "window_size": 1,
        "realised_cr": 1.3,
    }
    write(folder / RESULTS, [*chosen, kept])


def read_report(folder: Path) -> Any:
    measured = report_data.read_measured([str(folder / RESULTS)])
    for kind, results in (
        ("text", report_data.text_groups),
        ("answers", report_data.answer_results),
        ("greedy", report_data.greedy_results),
        ("kept", report_data.retention_results),
    ):
        assert (len(results(measured.kind(kind))) > 0) == (len(measured.kind(kind)) > 0)
    return repr(measured.records)


def meant_results(folder: Path) -> Any:
    """The whole lines as records, the first of each key."""
    *lines, last = (folder / RESULTS).read_bytes().decode().removeprefix("\ufeff").split("\n")
    with contextlib.suppress(ValueError):  # of a line that was not finished
        json.loads(last)
        lines.append(last)
    found = [oracles.strict_json(line.encode()) for line in lines if line.strip()]
    assert "header" in found[0]
    kept = [record_of(report_data.clean(line)) for line in found if "header" not in line]
    first: dict[tuple, Any] = {}
    for record in kept:
        first.setdefault(record.key, record)
    return repr(list(first.values()))


TARGETS = [
    Target("adapter file", 200, make_adapter, mutate_tensors(ADAPTER), read_adapter),
    Target("cache file, learned policy", 140, make_cache(None, 2), mutate_tensors(CACHE), read_cache),
    Target("cache file, tova", 100, make_cache("tova:8", 1), mutate_tensors(CACHE), read_cache),
    Target("token cache", 120, make_tokens, mutate_tokens, read_tokens, names="data.cache_dir"),
    Target("tuned.json", 120, make_tuned, mutate_tuned, read_tuned_file, meant_tuned),
    Target(
        "metrics.jsonl",
        100,
        make_metrics,
        mutate_lines(METRICS, ['{"step": "x"}', '{"step": null, "loss/total": 1}', '{"step": [1]}']),
        read_metrics,
        meant_metrics,
        names=METRICS,
    ),
    Target(
        "results.jsonl",
        200,
        make_results,
        mutate_lines(RESULTS, ['{"header": 3}', '{"header": {}, "options": [1]}', '{"options": {}}']),
        read_report,
        meant_results,
    ),
]
