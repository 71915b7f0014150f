"""Generate text with a compact cache: continue one prompt or a file of prompts, or hold a chat.

    python -m infer.generate --model runs/retrofit/export --prompt "The capital of France is"
    python -m infer.generate --model runs/retrofit/export --prompts questions.jsonl --as-chat --batch 4 \\
        --output answers.jsonl
    python -m infer.generate --model runs/retrofit/export --chat --temperature 0.7 --top-p 0.9
"""

from dms_jax.command import run_command
from dms_jax.commands.generate import NAME, main

if __name__ == "__main__":
    run_command(NAME, main)
