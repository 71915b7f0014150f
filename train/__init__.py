"""Commands for training, as they are typed in a checkout.

Their code is in `dms_jax.commands`; begin with `retrofit`.
"""
