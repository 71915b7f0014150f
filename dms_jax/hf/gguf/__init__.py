"""GGUF files, read only, and frozen: no architecture, quantization or tokenizer is added here.

Begin with `gguf_file.open_gguf`; `gguf_header` parses the bytes, `gguf_tokenizer` converts the tokenizer.
"""
