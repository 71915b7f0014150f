"""The way from files of text to batches: documents, a store of token ids, rows.

Begin with `documents`, then `token_store` and `rows`.
"""
