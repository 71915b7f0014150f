"""Before training, an answer: which compression ratio does a model bear on given text?

python -m train.inspect                                                # SmolLM2-135M on the default text
python -m train.inspect --set model=FOLDER --set data=FILE.jsonl
python -m train.inspect --set length=4096 --set dms.window_size=256 --set label_rows=24 --set eval_rows=10
"""

from dms_jax.command import run_command
from dms_jax.commands.inspect import NAME, main

if __name__ == "__main__":
    run_command(NAME, main)
