"""From a prompt to tokens: prefill, decoding, generation, calibration, and the chat session of the command line.

Begin with `decoding` (`init_cache`, `prefill`, `decode_step`), then `generation`.
"""
