"""Datasets of the hub by name, for training text and for evaluation problems."""

import re
from typing import Any

from dms_jax.errors import ConfigError


def open_dataset(name: str) -> Any:
    """The dataset of an `hf:NAME[:CONFIG][:SPLIT]` name. A single third part is the split if it reads like one; split `train` unless named.

    Raises ConfigError.
    """
    dataset, *rest = re.split(r":(?![^\[]*\])", name.removeprefix("hf:"))  # not the colon of a slice, `train[:1000]`
    split = (
        rest.pop()
        if len(rest) == 2 or (rest and re.match(r"(train|valid|validation|dev|test)\b", rest[0]))
        else "train"
    )
    if not dataset or len(rest) > 1:
        raise ConfigError(f"a dataset is named hf:NAME[:CONFIG][:SPLIT], got {name!r}")
    try:
        import datasets  # pyrefly: ignore[missing-import]  # an optional dependency, and slow to import
    except ImportError as why:
        raise ConfigError(f'{name} needs the datasets package: pip install "dms-jax[data]", or give files') from why
    try:
        return datasets.load_dataset(dataset, *rest, split=split)
    except Exception as why:  # the hub, the network and the dataset's own files raise errors without a common base
        raise ConfigError(
            f"cannot load {name}: {type(why).__name__}: {' '.join(str(why).split())}; offline, give files instead"
        ) from why
