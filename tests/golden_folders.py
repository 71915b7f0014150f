"""Complete model folders for tests of commands: a golden model of 131 tokens with a byte-level tokenizer."""

import json
import shutil
from pathlib import Path

from cases import GOLDEN
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

DMS, DENSE = "qwen3_dms_projection_per_head", "qwen3_qk_norm"
TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + ' ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant ' }}{% endif %}"
)


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """Write a byte-level tokenizer of the bytes that fit into 131 ids: printable ASCII, and the four bytes of one
    emoji."""
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(
        {letter for text in [*map(chr, range(32, 127)), "😀", "\n"] for letter in alphabet.pre_tokenize_str(text)[0][0]}
    )
    vocabulary = {"<|end|>": 0, "<|start|>": 1} | {letter: index for index, letter in enumerate(letters, start=2)}
    assert len(vocabulary) <= 131
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = alphabet, decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|start|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"} | (
        {"chat_template": template} if template else {}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def model_folder(folder: Path, name: str, template: str | None = TEMPLATE) -> Path:
    """Copy the golden model `name` to a new folder, and write a tokenizer next to it."""
    folder.mkdir(parents=True)
    shutil.copyfile(GOLDEN / name / "model.safetensors", folder / "model.safetensors")
    config = json.loads((GOLDEN / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    write_tokenizer(folder, template)
    return folder
