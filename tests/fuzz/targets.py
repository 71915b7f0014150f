"""All kinds of damaged input."""

from fuzz import chat_targets, config_targets, data_targets, gguf_targets, model_targets, own_targets, text_targets

TARGETS = [
    target
    for group in (config_targets, text_targets, model_targets, gguf_targets, own_targets, data_targets, chat_targets)
    for target in group.TARGETS
]
