"""Measure decode steps with dense and with compact caches of the same engine, and compare this engine with
transformers.

    python -m benchmarks.decode --model smollm2-135m --batch 1 --context 4096 --cr 1,2,4,8
    python -m benchmarks.decode --model FOLDER --transformers --prompt-tokens 512 --new-tokens 32

The caches are filled artificially: every head holds context / CR pairs, in buffers that are just large enough, and each
step appends one pair. One arm is `dense` (no policy, all pairs), and there is one arm for each CR under the policy. The
roofline of an arm is the speed at which a step could read its bytes, which are the weights and the live pairs.
--equal-memory adds arms with CR times as many rows, which hold as many pairs as the dense arm.

The arms alternate, so that a busy machine slows down all of them, unless their caches do not fit into memory together.
An arm that does not fit even alone is left out, and the output says so. --transformers needs torch and times `generate`
of both engines in fp32, on the same weights and random prompts. Prefill is the time of a call for one token, and decode
is the time that further tokens add. Compare the ratios of the medians. The last line is JSON.
"""

import argparse
import dataclasses
import json
import statistics
import time
from functools import partial

from benchmarks.benchmark_options import add_model, check_at_least, parse_ratios
from dms_jax.command import Parser, run_command, start_devices
from dms_jax.errors import ConfigError

NAME = "benchmarks.decode"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    add_model(parser, "smollm2-135m")
    add = parser.add_argument
    add("--batch", type=int, default=1, metavar="N", help="rows of the dense arm (default %(default)s)")
    context = "tokens seen before the timed steps (default %(default)s)"
    add("--context", type=int, default=4096, metavar="N", help=context)
    cr = "realised compression ratios; an empty list leaves the decode arms out (default %(default)s)"
    add("--cr", default="1,2,4,8", metavar="X,Y", help=cr)
    add("--steps", type=int, default=16, metavar="N", help="decode steps per timing (default %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="timings per arm (default %(default)s)")
    add("--equal-memory", action="store_true", help="for each CR above 1, also measure CR times as many rows")
    add("--transformers", action="store_true", help="also time `generate` of transformers (torch, fp32)")
    prompt = "tokens per prompt, with --transformers (default %(default)s)"
    add("--prompt-tokens", type=int, default=512, metavar="N", help=prompt)
    new = "tokens to generate, with --transformers (default %(default)s)"
    add("--new-tokens", type=int, default=32, metavar="N", help=new)
    add("--json", action="store_true", help="print only the JSON line")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    ratios = parse_ratios(options.cr)
    check_at_least(options, batch=1, context=2, steps=1, repeats=1, layers=0, prompt_tokens=2, new_tokens=2)
    start_devices(1)
    from benchmarks.models import load, provenance

    model, weights = load(options.model, options.layers, options.context, options.implementation)
    result = {
        "model": options.model,
        "weights": weights,
        "layers": model.config.num_layers,
        "implementation": options.implementation,
    } | provenance()
    show = (lambda *_: None) if options.json else print
    if ratios:
        result["decode"] = decode(options, model, ratios, show)
    if options.transformers:
        result["transformers"] = against_transformers(options, model, show)
    print(json.dumps(result))


def filled_cache(model, batch: int, context: int, live: int, room: int, dense: bool):
    """Make a cache of random numbers that has seen `context` tokens and holds `live` of them: the oldest and the
    newest, half each."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import dms_jax
    from dms_jax.core.visibility import NEVER
    from dms_jax.engine.cache_capacity import round_up

    cache = dms_jax.init_cache(model, batch, round_up(live + room), overflow="evict", dense=dense)
    position = np.concatenate([np.arange(live - live // 2), np.arange(context - live // 2, context)]).astype(np.int32)

    @partial(jax.jit, donate_argnums=0)
    def fill(layer, key):
        kv = jax.random.normal(key, (2, *layer.k.shape), layer.k.dtype)
        return dataclasses.replace(
            layer,
            k=kv[0],
            v=kv[1],
            position=layer.position.at[:, :, :live].set(position),
            expiry=layer.expiry.at[:, :, :live].set(NEVER),
        )

    layers, cache = list(cache.layers), dataclasses.replace(cache, layers=())
    for index in range(len(layers)):
        layers[index] = fill(layers[index], jax.random.key(index))
    return dataclasses.replace(cache, layers=tuple(layers), seen=jnp.full(batch, context, jnp.int32))


def decode(options, model, ratios: list[float], show) -> list[dict]:
    """Return a record for each arm. Each step feeds back the most likely token of the step before."""
    import jax

    from benchmarks.timing import measure_ceilings

    total = (options.repeats + 1) * options.steps
    if options.context + total > model.config.max_position_embeddings:
        raise ConfigError(
            f"--context plus {total} steps must fit into this model's context of "
            f"{model.config.max_position_embeddings} tokens, got {options.context + total}; use a smaller --context"
        )
    arms = {"dense": (True, 1.0, options.batch)} | {f"cr {ratio:g}": (False, ratio, options.batch) for ratio in ratios}
    if options.equal_memory:
        arms |= {f"cr {r:g}, {r:g}x rows": (False, r, round(options.batch * r)) for r in ratios if r > 1}
    live = {name: max(1, round(options.context / ratio)) for name, (_, ratio, _) in arms.items()}
    need = {name: cache_bytes(model, batch, live[name] + total) for name, (_, _, batch) in arms.items()}
    room = free_bytes()
    left_out = {
        name: f"needs {need[name] / 2**30:.1f} GiB of cache, {room / 2**30:.1f} are free"
        for name in arms
        if room < 1.2 * need[name]
    }
    arms = {name: arm for name, arm in arms.items() if name not in left_out}
    together = room >= 1.2 * sum(need[name] for name in arms)
    timed = {}
    for group in [list(arms)] if together else [[name] for name in arms]:
        try:
            timed |= timed_arms(model, {name: arms[name] for name in group}, live, options, total)
        except jax.errors.JaxRuntimeError as why:  # out of memory all the same; the other arms go on
            left_out |= {name: " ".join(str(why).split())[:200] for name in group}
    bandwidth = measure_ceilings(model.embed[...].dtype, 3, quick=True)[0].copy_bytes
    rows, dense, dense_bytes = [], timed.get("dense"), step_bytes(model, options.batch, options.context)
    for name, (seconds, counts, size) in timed.items():
        median, batch = statistics.median(seconds), arms[name][2]
        row = {
            "arm": name,
            "batch": batch,
            "tokens_seen": options.context,
            "live_at_start": live[name],
            "live_at_end": counts,
            "cache_bytes": size,
            "step_ms": 1e3 * median,
            "tokens_per_s": batch / median,
            "step_ms_all": [1e3 * s for s in seconds],
            "step_bytes": step_bytes(model, batch, live[name]),
        }
        row |= {
            "roofline_speed_to_dense": batch * dense_bytes / (options.batch * row["step_bytes"]),
            "fraction_of_copy_bandwidth": row["step_bytes"] / median / bandwidth,
        }
        text = f"{name:<16} live {live[name]:>6}  {row['step_ms']:>8.2f} ms per step "
        text += f"({1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f}), {row['tokens_per_s']:>8.1f} tokens/s"
        if dense is not None:
            row["speed_to_dense"] = row["tokens_per_s"] * statistics.median(dense[0]) / options.batch
            text += f", {row['speed_to_dense']:.2f}x dense (roofline {row['roofline_speed_to_dense']:.2f}x)"
        # If the dense arm does not fit, it is assumed to run at the device's copy bandwidth, faster than it would.
        row["dense"] = "measured" if dense is not None else "counted from bytes"
        row["fraction_of_roofline"] = (
            row["speed_to_dense"] / row["roofline_speed_to_dense"]
            if dense is not None
            else row["fraction_of_copy_bandwidth"]
        )
        rows.append(row)
        show(text)
    for name, why in left_out.items():
        rows.append({"arm": name, "skipped": why})
        show(f"{name:<16} left out: {why}")
    return rows


def timed_arms(model, arms: dict, live: dict, options, total: int) -> dict:
    """Return for each arm the seconds per step, the mean live pairs at the end, and the bytes of the cache."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import dms_jax

    caches = {
        name: filled_cache(model, batch, options.context, live[name], total, dense)
        for name, (dense, _, batch) in arms.items()
    }
    seconds = {name: [] for name in arms}
    for repeat in range(options.repeats + 1):
        for name in arms:
            cache = caches.pop(name)
            token = jnp.zeros(cache.batch_size, jnp.int32)
            start = time.perf_counter()
            for _ in range(options.steps):
                logits, cache = dms_jax.decode_step(model, cache, token, donate=True)
                token = jnp.argmax(logits, -1).astype(jnp.int32)
            jax.block_until_ready((token, cache))
            if repeat:  # the first one compiles
                seconds[name].append((time.perf_counter() - start) / options.steps)
            caches[name] = cache
    return {
        name: (seconds[name], float(np.asarray(cache.live_counts).mean()), cache.bytes)
        for name, cache in caches.items()
    }


def cache_bytes(model, batch: int, capacity: int) -> int:
    config = model.config
    return (
        config.num_layers
        * batch
        * config.num_kv_heads
        * capacity
        * (2 * config.head_dim * model.embed[...].dtype.itemsize + 12)
    )


def step_bytes(model, batch: int, live: int) -> int:
    """Return the bytes that a decode step must read: the weights of the layers and of the output, and the live pairs
    with position and expiry."""
    import jax
    from flax import nnx

    config = model.config
    weights = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model.layers)))
        + model.output_embedding().nbytes
    )
    pair = 2 * config.head_dim * model.embed[...].dtype.itemsize + 8
    return weights + config.num_layers * batch * config.num_kv_heads * live * pair


def free_bytes() -> float:
    """Return the free memory of the device; infinity for a device that does not report it, such as a CPU."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else float("inf")


def against_transformers(options, model, show) -> dict:
    """Time `generate` of both engines, greedy and without stop tokens: a call for one token, and a call for all
    tokens."""
    import importlib.util
    import tempfile

    import jax.numpy as jnp
    import numpy as np

    import dms_jax
    from benchmarks.models import cpu_cores
    from dms_jax.engine.cache_capacity import round_up

    if importlib.util.find_spec("torch") is None:
        raise ConfigError("--transformers requires torch; run pip install 'torch>=2.6'")
    if model.embed[...].dtype != jnp.float32 or (
        model.config.dms is not None and model.config.dms.variant == "borrowed"
    ):
        raise ConfigError(
            "--transformers requires an fp32 model without a borrowed policy; set JAX_PLATFORMS=cpu, or use another "
            "--model"
        )
    try:
        torch = importlib.import_module("torch")
    except ImportError as why:  # e.g. a CUDA build whose libraries are not there
        raise ConfigError(f"torch is installed but does not load: {why}") from why
    import transformers

    torch.set_num_threads(cpu_cores())
    with tempfile.TemporaryDirectory() as folder:
        dms_jax.save(model, f"{folder}/model")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            f"{folder}/model", dtype=torch.float32, local_files_only=True
        ).eval()
    ids = np.random.default_rng(0).integers(
        3, min(model.config.vocab_size, 40000), (options.batch, options.prompt_tokens)
    )
    capacity = round_up(options.prompt_tokens + options.new_tokens)

    def call_theirs(new: int):
        tokens = torch.tensor(ids)
        with torch.inference_mode():
            return theirs.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )[:, ids.shape[1] :].numpy()

    def call_ours(new: int, dense: bool):
        config = dms_jax.GenerationConfig(max_new_tokens=new, stop_ids=(), capacity=capacity, dense=dense)
        return np.stack(dms_jax.generate(model, ids, config).tokens)

    arms = {
        "transformers": call_theirs,
        "ours_dense": lambda new: call_ours(new, True),
        "ours_dms": lambda new: call_ours(new, False),
    }
    one, all_tokens, texts = {name: [] for name in arms}, {name: [] for name in arms}, {}
    for repeat in range(options.repeats + 1):
        for name, call in arms.items():
            for new, times in ((1, one[name]), (options.new_tokens, all_tokens[name])):
                start = time.perf_counter()
                texts[name] = call(new)
                if repeat:
                    times.append(time.perf_counter() - start)
    rates, medians = {}, {}
    for name in arms:
        first, whole = statistics.median(one[name]), statistics.median(all_tokens[name])
        if whole <= first:
            raise ConfigError(
                f"--new-tokens must be large enough to take longer than one token, got {options.new_tokens}; use more"
            )
        rates[name] = {
            "prefill_tokens_per_s": ids.size / first,
            "decode_tokens_per_s": options.batch * (options.new_tokens - 1) / (whole - first),
        }
        medians[name] = {"one_token_s": first, "all_tokens_s": whole}
        show(
            f"{name:<13} prefill {rates[name]['prefill_tokens_per_s']:>8.1f} tokens/s, decode "
            f"{rates[name]['decode_tokens_per_s']:>8.1f} tokens/s"
        )
    ratios = {
        f"{name}_{part}": rates[name][f"{part}_tokens_per_s"] / rates["transformers"][f"{part}_tokens_per_s"]
        for name in ("ours_dense", "ours_dms")
        for part in ("prefill", "decode")
    }
    same = float(np.mean(texts["ours_dense"] == texts["transformers"]))
    show(
        "relative to transformers: "
        + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        + f"; equal tokens {same:.0%}"
    )
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torch_threads": torch.get_num_threads(),
        "batch": options.batch,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rates": rates,
        "medians": medians,
        "ratios_to_transformers": ratios,
        "equal_tokens_dense": same,
    }


if __name__ == "__main__":
    run_command(NAME, main)
