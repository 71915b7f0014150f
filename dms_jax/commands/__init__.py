"""One file for each command: it parses options, calls the library and prints.

Begin with `retrofit` or `generate`. `dms-jax NAME`, and the modules in `train/` and `infer/` of a checkout, call the
`main` of these files.
"""
