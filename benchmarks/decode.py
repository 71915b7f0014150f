"""What a decode step costs: the same engine dense and with compact caches, and this engine next to transformers.

    python -m benchmarks.decode --model smollm2-135m --batch 1 --context 4096 --cr 1,2,4,8
    python -m benchmarks.decode --model FOLDER --transformers --prompt-tokens 512 --new-tokens 32

--model is a folder, or the shape of one (smollm2-135m, llama-3.2-1b, qwen3-8b) with random weights. The caches are filled by
hand: every head holds context / CR pairs, in buffers of just the size needed, and each step appends one pair; the arms are `dense`
(a model without a policy, all pairs) and one for each CR under the policy. --transformers, which needs torch, times `generate`
of both on the same weights and random prompts, fp32: prefill is a call for one token, decode what further tokens add.
The arms alternate, so that a busy machine hurts all; the ratios of the medians are what to look at. The last line is JSON.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import time

from dms_jax.command import Parser, run_command, start_devices
from dms_jax.config import ConfigError

NAME = "benchmarks.decode"
WINDOW = 128  # of the policy that is added to a model without one
SHAPES = {  # of the config.json of each
    "smollm2-135m": {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_layers": 30, "num_q_heads": 9,
                     "num_kv_heads": 3, "head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-1b": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_q_heads": 32,
                     "num_kv_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    "qwen3-8b": {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_layers": 36, "num_q_heads": 32,
                 "num_kv_heads": 8, "head_dim": 128, "qk_norm": True},
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", default="smollm2-135m", metavar="FOLDER_OR_SHAPE")
    parser.add_argument("--layers", type=int, default=0, help="of a random model; 0: as many as the named one has")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=4096, help="tokens seen before the timed steps")
    parser.add_argument("--cr", default="1,2,4,8", help="realised ratios, with commas between; empty for none")
    parser.add_argument("--steps", type=int, default=16, help="decode steps of one timing")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each arm")
    parser.add_argument("--transformers", action="store_true", help="also time transformers' generate (torch, fp32)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="with --transformers")
    parser.add_argument("--new-tokens", type=int, default=32, help="with --transformers")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    ratios = parse_ratios(options.cr)
    for name, least in {"batch": 1, "context": 2, "steps": 1, "repeats": 1, "layers": 0, "prompt_tokens": 2, "new_tokens": 2}.items():
        if getattr(options, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    start_devices(1)
    model, weights = load(options)
    result = {"model": options.model, "weights": weights, "layers": model.config.num_layers} | provenance()
    show = (lambda *_: None) if options.json else print
    if ratios:
        result["decode"] = decode(options, model, ratios, show)
    if options.transformers:
        result["transformers"] = against_transformers(options, model, show)
    print(json.dumps(result))


def parse_ratios(text: str) -> list[float]:
    try:
        ratios = [float(part) for part in text.split(",") if part]
    except ValueError:
        raise ConfigError(f"--cr wants numbers with commas between, e.g. 1,2,4; got {text!r}") from None
    if bad := [ratio for ratio in ratios if not ratio >= 1]:
        raise ConfigError(f"--cr must be >= 1 (1 keeps everything), got {bad[0]:g}")
    return ratios


def load(options):
    """The model with a policy, and where its weights are from."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import dms_jax
    from dms_jax.config import DMSConfig, ModelConfig
    from dms_jax.models.decoder import Decoder

    policy, dtype = DMSConfig(window_size=min(WINDOW, options.context // 8)), jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if options.model not in SHAPES:
        if options.layers:
            raise ConfigError(f"--layers goes with a named shape ({', '.join(SHAPES)}); a folder brings its own")
        model = dms_jax.load(options.model, dtype=dtype)
        return (model if model.config.dms else dms_jax.load(options.model, dtype=dtype, dms=policy)), options.model
    shape = SHAPES[options.model] | ({"num_layers": options.layers} if options.layers else {})
    config = ModelConfig(**shape, max_position_embeddings=1 << 20, dms=policy)
    return Decoder(config, rngs=nnx.Rngs(0), dtype=dtype), "random"


def provenance() -> dict:
    import jax

    import dms_jax

    device = jax.devices()[0]
    return {"dms_jax": dms_jax.__version__, "jax": jax.__version__, "python": platform.python_version(), "device": device.device_kind,
            "cpu": cpu_model(), "cores": usable_cores(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.processor())
    except OSError:
        return platform.processor()


def usable_cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def filled_cache(model, batch: int, context: int, live: int, room: int, dense: bool):
    """A cache that has seen `context` tokens of which the oldest `live` - window and the newest remain, as random numbers."""
    import jax.numpy as jnp
    import numpy as np

    import dms_jax
    from dms_jax.cache_limits import round_up
    from dms_jax.core.visibility import NEVER

    cache = dms_jax.init_cache(model, batch, round_up(live + room), overflow="evict", dense=dense)
    numbers = np.random.default_rng(0)
    position = np.concatenate([np.arange(live - live // 2), np.arange(context - live // 2, context)])

    def fill(layer):
        kv = jnp.asarray(numbers.standard_normal((batch, layer.k.shape[1], live, layer.k.shape[3]), np.float32), layer.k.dtype)
        return dataclasses.replace(layer, k=layer.k.at[:, :, :live].set(kv), v=layer.v.at[:, :, :live].set(kv),
                                   position=layer.position.at[:, :, :live].set(position), expiry=layer.expiry.at[:, :, :live].set(NEVER))  # fmt: skip

    return dataclasses.replace(cache, layers=tuple(map(fill, cache.layers)), seen=jnp.full(batch, context, jnp.int32), bounds=None)


def decode(options, model, ratios: list[float], show) -> list[dict]:
    """Seconds of a step for each arm; each step's token is the best one of the step before."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import dms_jax

    limit = model.config.max_position_embeddings
    total = (options.repeats + 1) * options.steps
    if options.context + total > limit:
        raise ConfigError(f"--context {options.context} and {total} steps are beyond this model's context of {limit}")
    arms = {"dense": (True, 1.0)} | {f"cr {ratio:g}": (False, ratio) for ratio in ratios}
    caches, live, seconds = {}, {}, {name: [] for name in arms}
    for name, (dense, ratio) in arms.items():
        live[name] = max(1, round(options.context / ratio))
        caches[name] = filled_cache(model, options.batch, options.context, live[name], total, dense)
    for repeat in range(options.repeats + 1):
        for name in arms:
            cache, token = caches.pop(name), jnp.zeros(options.batch, jnp.int32)
            start = time.perf_counter()
            for _ in range(options.steps):
                logits, cache = dms_jax.decode_step(model, cache, token, donate=True)
                token = jnp.argmax(logits, -1).astype(jnp.int32)
            jax.block_until_ready((token, cache))
            if repeat:  # the first one compiles
                seconds[name].append((time.perf_counter() - start) / options.steps)
            caches[name] = cache
    dense = statistics.median(seconds["dense"])
    rows = []
    for name in arms:
        median, counts = statistics.median(seconds[name]), np.asarray(caches[name].live_counts)
        rows.append({"arm": name, "batch": options.batch, "tokens_seen": options.context, "live_at_start": live[name],
                     "live_at_end": float(counts.mean()), "cache_bytes": caches[name].bytes, "step_ms": 1e3 * median,
                     "tokens_per_s": options.batch / median, "step_ms_all": [1e3 * s for s in seconds[name]],
                     "speed_to_dense": dense / median})  # fmt: skip
        show(f"{name:<8} live {live[name]:>6}  {1e3 * median:>8.2f} ms a step ({1e3 * min(seconds[name]):.2f} to {1e3 * max(seconds[name]):.2f}), "
             f"{options.batch / median:>8.1f} tokens/s, {dense / median:.2f}x dense")  # fmt: skip
    return rows


def against_transformers(options, model, show) -> dict:
    """Both engines' `generate`, greedy, without a stop: seconds of a call for one token, and for all of them."""
    import importlib.util
    import tempfile

    import jax.numpy as jnp
    import numpy as np

    import dms_jax
    from dms_jax.cache_limits import round_up

    if importlib.util.find_spec("torch") is None:
        raise ConfigError("--transformers needs torch; pip install 'torch>=2.6'")
    if model.embed[...].dtype != jnp.float32 or (model.config.dms is not None and model.config.dms.variant == "borrowed"):
        raise ConfigError("--transformers compares a dense base in fp32 on a CPU; set JAX_PLATFORMS=cpu and give a model without a borrowed policy")
    try:
        torch = importlib.import_module("torch")
    except ImportError as why:  # e.g. a CUDA build whose libraries are not there
        raise ConfigError(f"torch is installed but does not load: {why}") from why
    import transformers

    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory() as folder:
        dms_jax.save(model, f"{folder}/model")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32, local_files_only=True).eval()
    ids = np.random.default_rng(0).integers(3, min(model.config.vocab_size, 40000), (options.batch, options.prompt_tokens))
    capacity = round_up(options.prompt_tokens + options.new_tokens)

    def call_theirs(new: int):
        tokens = torch.tensor(ids)
        with torch.inference_mode():
            return theirs.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new, min_new_tokens=new,
                                   pad_token_id=0)[:, ids.shape[1] :].numpy()  # fmt: skip

    def call_ours(new: int, dense: bool):
        config = dms_jax.GenerationConfig(max_new_tokens=new, stop_ids=(), capacity=capacity, dense=dense)
        return np.stack(dms_jax.generate(model, ids, config).tokens)

    arms = {"transformers": call_theirs, "ours_dense": lambda new: call_ours(new, True), "ours_dms": lambda new: call_ours(new, False)}
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
            raise ConfigError(f"{options.new_tokens} tokens take no longer than one here; give a larger --new-tokens to time the decode")
        rates[name] = {"prefill_tokens_per_s": ids.size / first, "decode_tokens_per_s": options.batch * (options.new_tokens - 1) / (whole - first)}
        medians[name] = {"one_token_s": first, "all_tokens_s": whole}
        show(f"{name:<13} prefill {rates[name]['prefill_tokens_per_s']:>8.1f} tokens/s, decode {rates[name]['decode_tokens_per_s']:>8.1f} tokens/s")
    ratios = {f"{name}_{part}": rates[name][f"{part}_tokens_per_s"] / rates["transformers"][f"{part}_tokens_per_s"]
              for name in ("ours_dense", "ours_dms") for part in ("prefill", "decode")}  # fmt: skip
    same = float(np.mean(texts["ours_dense"] == texts["transformers"]))
    show("relative to transformers: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()) + f"; equal tokens {same:.0%}")
    return {"torch": torch.__version__, "transformers": transformers.__version__, "torch_threads": torch.get_num_threads(), "batch": options.batch,
            "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "rates": rates, "medians": medians,
            "ratios_to_transformers": ratios, "equal_tokens_dense": same}  # fmt: skip


if __name__ == "__main__":
    run_command(NAME, main)
