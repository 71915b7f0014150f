"""Measure what a cache policy costs: compare a retrofitted model with the dense model, and with training-free methods
that keep as many live tokens.

    python -m infer.evaluate --model runs/retrofit/export --text FILE
    python -m infer.evaluate --model runs/retrofit/export --text prose=A.txt --text code=B.py \\
        --policies dense,dms,tova,h2o --budgets cr2,cr4 --tasks text,greedy,kept,needle_single --haystack A.txt \\
        --output results.jsonl
"""

from dms_jax.command import run_command
from dms_jax.commands.evaluate import NAME, main

if __name__ == "__main__":
    run_command(NAME, main)
