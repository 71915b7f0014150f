"""Commands that use a trained model, as they are typed in a checkout; their code is in `dms_jax.commands`."""
