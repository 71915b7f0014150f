"""Hyper-scaling: measure what more or longer answers gain once a compressed cache makes them cheap (arXiv:2506.05345).

    python -m infer.hyperscale --model runs/retrofit/export --task gsm8k --configs 1-256-1,1-256-4,4-256-4 \\
        --output scaling.jsonl
    python -m infer.hyperscale --results scaling.jsonl            # the tables again, without a model
"""

from dms_jax.command import run_command
from dms_jax.commands.hyperscale import NAME, main

if __name__ == "__main__":
    run_command(NAME, main)
