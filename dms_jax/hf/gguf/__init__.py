"""Read GGUF files. This reader is frozen: new architectures and quantizations are not added.

Begin with `gguf_file.open_gguf`; `gguf_header` parses the bytes, `gguf_metadata` decides about the metadata keys,
`gguf_tokenizer` converts the tokenizer, with `gguf_sentencepiece` for files that have scores instead of merges.
"""
