"""Turn files of text into batches: documents, then a store of token ids, then rows.

Begin with `documents` (formats), then read `token_store` (tokenization, cache, held-out split) and `rows` (batches).
`default_assets` fetches the embedded default model and makes the embedded default text.
"""
