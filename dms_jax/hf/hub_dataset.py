"""Datasets of the Hugging Face hub, for training text and for evaluation problems."""

import re
from typing import Any

from dms_jax.errors import ConfigError


def open_dataset(name: str) -> Any:
    """Load a dataset by a name of the form `hf:NAME[:CONFIG][:SPLIT]`.

    If only one of CONFIG and SPLIT is given, it counts as the split if it looks like one. The default split is `train`.

    Raises:
      ConfigError: the name is malformed, the `datasets` package is missing, or the dataset cannot be loaded.
    """
    dataset, *rest = re.split(
        r":(?![^\[]*\])", name.removeprefix("hf:")
    )  # but not at the colon in a slice such as `train[:1000]`
    split = (
        rest.pop()
        if len(rest) == 2 or (rest and re.match(r"(train|valid|validation|dev|test)\b", rest[0]))
        else "train"
    )
    if not dataset or len(rest) > 1:
        raise ConfigError(f"a dataset name must be hf:NAME[:CONFIG][:SPLIT], got {name!r}")
    try:
        import datasets  # pyrefly: ignore[missing-import]  # optional, and slow to import
    except ImportError:
        raise ConfigError(f'{name} needs the datasets package: pip install "dms-jax[data]", or give files') from None
    try:
        return datasets.load_dataset(dataset, *rest, split=split)
    except Exception as why:  # errors of the hub, the network and the files have no common base class
        raise ConfigError(
            f"cannot load {name}: {type(why).__name__}: {' '.join(str(why).split())}; offline, give files instead"
        ) from None
