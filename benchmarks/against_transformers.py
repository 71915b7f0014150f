"""Time `generate` of this engine and of transformers on the same weights and prompts, for `benchmarks.decode`."""

import argparse
import importlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

from dms_jax.errors import ConfigError


def against_transformers(options: argparse.Namespace, model, show: Callable[[str], object]) -> dict:
    """Time `generate` of both engines, greedy and without stop tokens: a call for one token, and a call for all
    tokens."""
    torch = usable_torch(model)
    import transformers

    ids = np.random.default_rng(0).integers(
        3, min(model.config.vocab_size, 40000), (options.batch, options.prompt_tokens)
    )
    arms = {"transformers": their_generate(torch, model, ids)} | our_generates(model, ids, options.new_tokens)
    one, whole, texts = timed_calls(arms, options.new_tokens, options.repeats)
    rates, medians = {}, {}
    for name in arms:
        first, total = statistics.median(one[name]), statistics.median(whole[name])
        if total <= first:
            raise ConfigError(
                f"--new-tokens must be large enough to take longer than one token, got {options.new_tokens}; use more"
            )
        rates[name] = {
            "prefill_tokens_per_s": ids.size / first,
            "decode_tokens_per_s": options.batch * (options.new_tokens - 1) / (total - first),
        }
        medians[name] = {"one_token_s": first, "all_tokens_s": total}
        prefill, decode = rates[name].values()
        show(f"{name:<13} prefill {prefill:>8.1f} tokens/s, decode {decode:>8.1f} tokens/s")
    ratios = {
        f"{name}_{part}": rates[name][f"{part}_tokens_per_s"] / rates["transformers"][f"{part}_tokens_per_s"]
        for name in ("ours_dense", "ours_dms")
        for part in ("prefill", "decode")
    }
    same = float(np.mean(texts["ours_dense"] == texts["transformers"]))
    listed = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    show(f"relative to transformers: {listed}; equal tokens {same:.0%}")
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torch_threads": torch.get_num_threads(),
        "batch": options.batch,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rates": rates,
        "medians": medians,
        "ratios_to_transformers": ratios,
        "equal_tokens_dense": same,
    }


def usable_torch(model):
    """Return the module torch with as many threads as there are cores. Raise ConfigError if it cannot be used."""
    import jax.numpy as jnp

    from benchmarks.models import cpu_cores

    if importlib.util.find_spec("torch") is None:
        raise ConfigError("--transformers requires torch; run pip install 'torch>=2.6'")
    borrowed = model.config.dms is not None and model.config.dms.variant == "borrowed"
    if model.embed[...].dtype != jnp.float32 or borrowed:
        raise ConfigError(
            "--transformers requires an fp32 model without a borrowed policy; set JAX_PLATFORMS=cpu, or use another "
            "--model"
        )
    try:
        torch = importlib.import_module("torch")
    except ImportError as why:  # e.g. a CUDA build whose libraries are not there
        raise ConfigError(f"torch is installed but does not load: {why}") from why
    torch.set_num_threads(cpu_cores())
    return torch


def their_generate(torch, model, ids: np.ndarray) -> Callable[[int], np.ndarray]:
    """Return a function that lets transformers generate a given number of tokens [B, new] after the prompts [B, T]."""
    import transformers

    import dms_jax

    with tempfile.TemporaryDirectory() as folder:
        dms_jax.save(model, f"{folder}/model")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            f"{folder}/model", dtype=torch.float32, local_files_only=True
        ).eval()

    def call(new: int) -> np.ndarray:
        tokens = torch.tensor(ids)
        with torch.inference_mode():
            return theirs.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )[:, ids.shape[1] :].numpy()

    return call


def our_generates(model, ids: np.ndarray, new_tokens: int) -> dict[str, Callable[[int], np.ndarray]]:
    """Return the same function for this engine, with a dense cache and with a compact one."""
    import dms_jax
    from dms_jax.engine.cache_capacity import round_up

    capacity = round_up(ids.shape[1] + new_tokens)

    def call(new: int, dense: bool) -> np.ndarray:
        config = dms_jax.GenerationConfig(max_new_tokens=new, stop_ids=(), capacity=capacity, dense=dense)
        return np.stack(dms_jax.generate(model, ids, config).tokens)

    return {"ours_dense": lambda new: call(new, True), "ours_dms": lambda new: call(new, False)}


def timed_calls(arms: dict[str, Callable[[int], np.ndarray]], new_tokens: int, repeats: int) -> tuple[dict, dict, dict]:
    """Return for each arm the seconds for one token, the seconds for all tokens, and the tokens. Calls alternate."""
    one, whole, texts = {name: [] for name in arms}, {name: [] for name in arms}, {}
    for repeat in range(repeats + 1):
        for name, call in arms.items():
            for new, times in ((1, one[name]), (new_tokens, whole[name])):
                start = time.perf_counter()
                texts[name] = call(new)
                if repeat:  # the first call compiles
                    times.append(time.perf_counter() - start)
    return one, whole, texts
