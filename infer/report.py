"""Turn files of results into one HTML page, with its figures also as PNGs.

python -m infer.report runs/eval/results.jsonl --output runs/eval/report
"""

from dms_jax.command import run_command
from dms_jax.commands.report import NAME, main

if __name__ == "__main__":
    run_command(NAME, main)
