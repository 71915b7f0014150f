"""The commands, one file each: parse options, call the library, print.

Begin with `retrofit` or `generate`. `dms-jax NAME` calls the `main` of a command, and so do the modules in `train/` and
`infer/` of a checkout.
"""
