"""Read GGUF files. This reader is frozen: new architectures, quantizations and tokenizers are not added.

Begin with `gguf_file.open_gguf`; `gguf_header` parses the bytes, `gguf_tokenizer` converts the tokenizer.
"""
