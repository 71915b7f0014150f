"""Show that a refactor changes no number, with digests of the results of every path before and after it.

    python -m benchmarks.same_numbers --write BEFORE.jsonl     # on the old commit
    python -m benchmarks.same_numbers --against BEFORE.jsonl   # on the new commit, same machine, same packages

The digests cover ten retrofit steps in every mode (metrics of each step and all exported tensors), the models in
tests/golden/ (dense, hard and relaxed logits, decisions), and the paths of inference (prefill whole and in chunks,
decoding, training-free policies, generation). The script uses only the public surface and the commands, so that it runs
unchanged on both commits.
"""

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

import dms_jax

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
BASE = GOLDEN / "llama3_rope_scaled"
RUNS = {
    "adapter": [],
    "adapter, shift 0, one decision per layer": ["dms.decision_shift=0", "dms.granularity=layer"],
    "adapter, other loss": ["loss.order=teacher_student", "loss.scope=layer", "loss.decidable_only=true"],
    "adapter, accumulated": ["accumulate=2", "remat=none"],
    "adapter, bfloat16": ["dtype=bfloat16"],
    "full": ["mode=full", "remat=full"],
    "borrowed": ["mode=borrowed"],
    "full on 2x2": ["mode=full", "mesh=2x2"],
    "adapter on 2x2x2": ["mesh=2x2x2"],
}
POLICIES = (
    "dense",
    "dms",
    "streaming_llm:12",
    "tova:12",
    "h2o:12",
    "observed_attention:12",
    "snapkv:16",
    "knorm:12",
    "keydiff:12",
    "random_all:12",
    "vase:20",
    "expected_attention:12",
    "quest:48",
    "immediate_eviction",
)


def digest(value: object) -> str:
    """Return a short digest of an array, including its dtype and shape."""
    array = np.asarray(value)
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()[
        :16
    ]


def retrofit_runs() -> Iterator[tuple[str, str]]:
    """Yield (name, digest) of the steps, validations and exported tensors of RUNS."""
    for name, settings in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/ids.npy", np.random.default_rng(0).integers(0, 97, (60, 70)).astype(np.int32))
            pairs = [
                f"model={BASE}",
                f"data={folder}/ids.npy",
                f"data.cache_dir={folder}/cache",
                f"output={folder}/run",
                "steps=10",
                "length=48",
                "batch_size=8",
                "dms.window_size=6",
                "dms.target_cr=3",
                "dms.decision_shift=1",
                "init=zero",
                "eval_rows=4",
                "optimizer.learning_rate=0.001",
                "mesh=1x1",
                *settings,
            ]
            arguments = itertools.chain.from_iterable(("--set", pair) for pair in pairs)
            subprocess.run([sys.executable, "-m", "train.retrofit", *arguments], check=True, capture_output=True)
            for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines():
                record = {
                    key: value
                    for key, value in json.loads(line).items()
                    if not key.startswith(("time/", "memory/", "header", "config"))
                }
                step = record.get("step", "start")
                kind = "step" if "loss/total" in record else "held out"
                numbers = {
                    key: value
                    for key, value in record.items()
                    if key.startswith(("loss/", "optim/", "cache/", "held_out/"))
                }
                yield (
                    f"retrofit {name}: {kind} {step}",
                    digest(np.frombuffer(json.dumps(numbers, sort_keys=True).encode(), np.uint8)),
                )
            exported = dms_jax.load(Path(folder, "run", "export"))
            for index, leaf in enumerate(jax.tree.leaves(exported)):
                yield f"retrofit {name}: tensor {index}", digest(leaf)


def golden_models() -> Iterator[tuple[str, str]]:
    """Yield (name, digest) of logits and decisions of the models in tests/golden/."""
    for folder in sorted(path.parent for path in GOLDEN.glob("*/config.json")):
        dms = None if "_dms_" in folder.name else dms_jax.DMSConfig(window_size=4, evict_logit_bias=0.0)
        model = dms_jax.load(folder, dms=dms)
        c = model.config
        rng = np.random.default_rng(1)
        ids = rng.integers(0, c.vocab_size, (2, 40)).astype(np.int32)
        noise = rng.logistic(size=(c.num_layers, 2, c.num_kv_heads, 40)).astype(np.float32)
        yield f"{folder.name}: dense", digest(model.dense(ids))
        for path, results in {"hard": model.hard(ids), "relaxed": model.relaxed(ids, noise)}.items():
            for part, result in zip(("logits", "evictions"), results, strict=True):
                yield f"{folder.name}: {path} {part}", digest(result)
        yield from caches(folder.name, model, ids)


def caches(name: str, model, ids: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield (name, digest) of prefill and decoding."""
    for chunk_size in (None, 13):
        logits, cache = dms_jax.prefill(model, dms_jax.init_cache(model, 2, 64), ids[:, :30], chunk_size=chunk_size)
        yield f"{name}: prefill in chunks of {chunk_size}", digest(logits)
        for step in range(30, 40):
            logits, cache = dms_jax.decode_step(model, cache, ids[:, step])
            yield f"{name}: decode {step} after chunks of {chunk_size}", digest(logits)
        yield f"{name}: live counts after chunks of {chunk_size}", digest(cache.live_counts)


def policies() -> Iterator[tuple[str, str]]:
    """Yield (name, digest) of all policies, of generation and of a cache that overflows."""
    model = dms_jax.load(GOLDEN / "qwen3_dms_projection_per_head")
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, (2, 40)).astype(np.int32)
    for policy in POLICIES:
        logits, cache = dms_jax.prefill(
            model, dms_jax.init_cache(model, 2, 64, policy=policy), ids[:, :30], chunk_size=8
        )
        last, cache = dms_jax.decode_step(model, cache, ids[:, 30])
        yield f"policy {policy}: logits", digest(np.concatenate([logits[:, -1], last]))
        yield f"policy {policy}: live counts", digest(cache.live_counts)
    prompts = [ids[0, :9].tolist(), ids[1, :14].tolist()]
    for temperature in (0.0, 0.8):
        out = dms_jax.generate(
            model, prompts, dms_jax.GenerationConfig(max_new_tokens=24, temperature=temperature, stop_ids=())
        )
        yield f"generate at {temperature}: tokens", digest(np.stack(out.tokens))
    small = dms_jax.init_cache(model, 2, 12)
    logits, small = dms_jax.prefill(model, small, ids[:, :30], chunk_size=8)
    yield "forced evictions: logits", digest(logits)
    yield "forced evictions: counts", digest(small.forced_evictions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", metavar="FILE", help="save the digests of this commit")
    choice.add_argument(
        "--against", metavar="FILE", help="compare this commit with saved digests; the exit code is 1 if any differs"
    )
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    found = dict(itertools.chain(golden_models(), policies(), retrofit_runs()))
    if options.write:
        Path(options.write).write_text(
            "".join(json.dumps([name, value]) + "\n" for name, value in found.items()), encoding="utf-8"
        )
        print(f"{len(found)} digests written to {options.write} (jax {jax.__version__})")
        return
    before = dict(json.loads(line) for line in Path(options.against).read_text(encoding="utf-8").splitlines())
    differing = [name for name in before.keys() | found.keys() if before.get(name) != found.get(name)]
    same = sum(found.get(name) == value for name, value in before.items())
    print(f"{same} of {len(before)} digests are the same; {len(differing)} differ or are missing")
    for name in sorted(differing):
        print(f"  {name}")
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
