"""Commands that train, as they are typed in a checkout; their code is in `dms_jax.commands` and `dms_jax.training`."""
