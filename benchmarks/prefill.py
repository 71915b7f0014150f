"""Measure prefill, dense and under a policy that evicts pairs while the prompt is read.

    python -m benchmarks.prefill --model llama-3.2-1b --batch 1 --context 8192 --cr 2,4,8 --json

The evict head is random. Its threshold is set so that a fraction 1 - 1/CR of the decisions on a sample of tokens evict;
the output reports the realised CR. Prompts are random tokens. The capacity is 1.5 times what the CR needs. The last
line is JSON.
"""

import argparse
import json

from benchmarks.benchmark_options import add_model, check_at_least, parse_ratios
from benchmarks.ragged import memory_record, memory_text
from dms_jax.command import Parser, run_command, start_devices

NAME = "benchmarks.prefill"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    add_model(parser, "smollm2-135m")
    add = parser.add_argument
    add("--batch", type=int, default=1, metavar="N", help="prompts per batch (default %(default)s)")
    add("--context", type=int, default=2048, metavar="N", help="tokens per prompt (default %(default)s)")
    add("--cr", default="2,4,8", metavar="X,Y", help="nominal compression ratios (default %(default)s)")
    add("--chunk-size", type=int, metavar="N", help="tokens per prefill chunk (default: chosen by the engine)")
    add("--repeats", type=int, default=5, metavar="N", help="timings per arm (default %(default)s)")
    add("--json", action="store_true", help="print only the JSON line")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    ratios = parse_ratios(options.cr)
    check_at_least(options, batch=1, context=16, repeats=1, layers=0)
    start_devices(1)
    from benchmarks.models import load, provenance

    model, weights = load(options.model, options.layers, options.context, options.implementation)
    rows = prefill(options, model, ratios, (lambda *_: None) if options.json else print)
    result = {
        "model": options.model,
        "weights": weights,
        "layers": model.config.num_layers,
        "implementation": options.implementation,
    }
    print(json.dumps(result | provenance() | {"prefill": rows}))


def prefill(options, model, ratios: list[float], show) -> list[dict]:
    """Return a record for each arm."""
    import jax
    import numpy as np

    import dms_jax
    from benchmarks.timing import time_all
    from dms_jax.engine.cache_capacity import round_up

    numbers = np.random.default_rng(0)
    prompt = numbers.integers(0, model.config.vocab_size, (options.batch, options.context)).astype(np.int32)
    scores = random_scores(model, prompt[:1, : min(options.context, 1024)])
    arms = {"dense": (None, options.context)}
    for ratio in ratios:
        arms[f"cr {ratio:g}"] = (
            float(np.quantile(scores, 1 / ratio)),
            min(options.context, round(1.5 * options.context / ratio) + 256),
        )

    made = {}

    def read(name: str):
        threshold, capacity = arms[name]
        cache = dms_jax.init_cache(model, options.batch, round_up(capacity), dense=threshold is None)
        made[name] = dms_jax.prefill(
            model, cache, prompt, chunk_size=options.chunk_size, threshold=threshold or 0.0, last_only=True, donate=True
        )
        return made[name][0]

    pair_bytes = 2 * model.config.head_dim * model.embed[...].dtype.itemsize
    timing = time_all({name: lambda name=name: read(name) for name in arms}, options.repeats)
    rows = []
    for name, times in timing.items():
        cache = made[name][1]
        rows.append(
            {
                "arm": name,
                "batch": options.batch,
                "context": options.context,
                "seconds": times.median,
                "seconds_all": times.all,
                "tokens_per_s": prompt.size / times.median,
                "speed_to_dense": timing["dense"].median / times.median,
                **memory_record(np.asarray(cache.live_counts), cache.bytes, pair_bytes),
                "realised_cr": dms_jax.compression_ratio(cache),
                "forced_evictions": int(jax.numpy.sum(cache.forced_evictions)),
            }
        )
        show(
            "{arm:<8} {tokens_per_s:>10.0f} tokens/s, {speed_to_dense:.2f}x dense, realised CR {realised_cr:.2f}, "
            "{forced_evictions} forced evictions, {memory}".format(memory=memory_text(rows[-1]), **rows[-1])
        )
    return rows


def random_scores(model, tokens):
    """Return the evict logits of `tokens`. A model that never evicts first gets a random evict head, in place."""
    import jax
    import numpy as np

    attention = model.layers.attention
    if model.config.dms.variant == "projection" and not np.asarray(jax.numpy.abs(attention.evict_proj[...]).max()):
        attention.evict_proj[...] = 1e-3 * jax.random.normal(jax.random.key(1), attention.evict_proj[...].shape)
    return np.asarray(model.hard_scores(tokens, threshold=1e30))


if __name__ == "__main__":
    run_command(NAME, main)
