"""Read and write models and what belongs to them: Hugging Face folders, GGUF files, tokenizers, adapters, saved caches.

Begin with `folder` (`load` and `save`); `hf_config` translates keys and `hf_weights` translates tensors.
"""
