"""The border to foreign formats: Hugging Face folders, GGUF files, adapters, saved caches, tokenizers.

Begin with `folder` (`load` and `save`); `hf_config` and `hf_weights` translate keys and tensors.
"""
