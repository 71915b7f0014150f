"""Retrofit a pretrained model with a learned eviction policy, by distillation from itself.

python -m train.retrofit                                   # SmolLM2-135M on the default text
python -m train.retrofit --mesh 8x1                        # on 8 devices, which a CPU simulates
python -m train.retrofit --mesh 2x2x2 --set length=131072  # long rows, each split over the context axis
python -m train.retrofit --set model=FOLDER --set data=FILE.jsonl --set dms.window_size=256 --set dms.target_cr=4
python -m train.retrofit --config configs/train/llama3p2_1b.yaml --mesh 8x1 --resume
"""

from dms_jax.command import run_command
from dms_jax.commands.retrofit import NAME, main

if __name__ == "__main__":
    run_command(NAME, main)
