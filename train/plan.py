"""Predict whether a retrofit fits on named hardware and how long it takes, or how many users a server can hold and how
fast it decodes. Neither the weights nor the hardware are needed.

    python -m train.plan --model configs/models/qwen3-8b.json --hardware h100x8 --mesh 8x1 --length 32768 --batch 8
    python -m train.plan --model FOLDER --hardware v5e-8 --mesh 4x2 --length 4096 --batch 8 --mode full --json
    python -m train.plan --model FOLDER --hardware h200x1 --inference --users 8 --context 32768
"""

from dms_jax.command import run_command
from dms_jax.commands.plan import NAME, main

if __name__ == "__main__":
    run_command(NAME, main)
