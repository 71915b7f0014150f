"""From files of text to batches: documents, a store of token ids, packed rows.

Begin with `documents`, then `token_store` and `rows`.
"""
