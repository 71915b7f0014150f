"""Measure a retrofitted model on text: perplexity and KL against its dense self, next to a sliding window of equal size.

    python -m infer.evaluate --model runs/retrofit/export --text FILE [--length 1024] [--rows 16]

The text is tokenised as one stream and cut into rows of --length tokens.
"""

import argparse
import json
from pathlib import Path

from dms_jax.command import Parser, run_command, start_devices
from dms_jax.config import ConfigError

NAME = "infer.evaluate"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a folder with dms_* keys, or a plain one together with --adapter")
    parser.add_argument("--adapter", metavar="FILE", help="an adapter of this base model")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=16, help="rows at most")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.length < 2 or options.rows < 1:
        raise ConfigError("--length must be at least 2 and --rows at least 1")
    start_devices(1)
    import jax
    import jax.numpy as jnp

    import dms_jax
    from dms_jax.evaluation import held_out_report, retrofit_rows, sliding_window_rows

    model = dms_jax.load(options.model, dtype=jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    if options.adapter:
        model = dms_jax.load_adapter(model, options.adapter)
    if model.config.dms is None:
        raise ConfigError(f"{options.model} has no eviction policy; give a retrofitted folder, or --adapter FILE")
    batches = _batches(read_text(options.text), dms_jax.load_tokenizer(options.model), options.length, options.rows)
    retrofit = jax.jit(lambda tokens, segments: retrofit_rows(model, model, tokens, segments))
    window = jax.jit(lambda tokens, segments, policy: sliding_window_rows(model, tokens, segments, policy), static_argnums=2)
    report = held_out_report(
        batches,
        options.length,
        lambda b: retrofit(b.tokens, b.segment_ids),
        lambda b, policy: window(b.tokens, b.segment_ids, policy),
    )
    print(json.dumps(report.as_metrics()) if options.json else report.table())


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as why:
        raise ConfigError(f"cannot read {path}: {why}") from why


def _batches(text: str, tokenizer, length: int, rows: int) -> list:
    from dms_jax.evaluation import EvaluationBatch

    ids = tokenizer.encode(text)
    count = min(rows, len(ids) // length)
    if count == 0:
        raise ConfigError(f"the text has {len(ids)} tokens, too few for one row of {length}; use --length {max(2, len(ids))} or more text")
    return [EvaluationBatch.whole(row[None]) for row in ids[: count * length].reshape(count, length)]


if __name__ == "__main__":
    run_command(NAME, main)
