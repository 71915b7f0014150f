"""Commands that use a trained model, as they are typed in a checkout.

Their code is in `dms_jax.commands`; begin with `generate`.
"""
