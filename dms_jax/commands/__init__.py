"""One file for each command: parse options, call the library, print.

Begin with `retrofit` or `generate`; `dms-jax NAME` and the modules in `train/` and `infer/` of a checkout call their `main`.
"""
