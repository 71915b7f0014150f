"""The interface that all caches share, so that prefill, decoding and everything after them take any of them.

`compact_cache.CompactCache` has slots of a fixed number, `paged_cache.PagedCache` has pages.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import jax
import numpy as np
from jaxtyping import Int

from dms_jax.axes import Array
from dms_jax.config import Overflow
from dms_jax.errors import ConfigError

NO_TOKEN = -1  # not a token id


class HostBounds(NamedTuple):
    """Upper bounds that the host keeps without reading the device."""

    seen: int  # tokens seen by any row
    live: tuple[int, ...] = ()  # live pairs of any row and head, for each layer; of slots only
    budgets: tuple[int, ...] | None = None  # the largest budget of any head, for each layer; None without budgets
    tokens: int = 0  # tokens that each row may still append until pages can run out; of pages only


class TokenHistory(NamedTuple):
    """The tokens that each row of a cache has seen, as far as a repetition penalty and a chat need to know them."""

    ids: tuple[np.ndarray, ...]  # distinct ids of each row, sorted, int32
    last: tuple[int, ...]  # the id that each row has seen last; NO_TOKEN for a row that has seen none

    def extended(self, rows: Sequence[np.ndarray]) -> "TokenHistory":
        """Return the history after each row has also seen the tokens in `rows`."""
        last = (int(row[-1]) if len(row) else before for row, before in zip(rows, self.last, strict=True))
        ids = (np.union1d(known, row).astype(np.int32) for known, row in zip(self.ids, rows, strict=True))
        return TokenHistory(tuple(ids), tuple(last))

    @staticmethod
    def empty(rows: int) -> "TokenHistory":
        return TokenHistory((np.zeros(0, np.int32),) * rows, (NO_TOKEN,) * rows)


class CacheBytes(int):
    """The memory of all arrays of a cache, including the bookkeeping, as a number of bytes.

    `live` and `dense` count keys and values only: those of the pairs that are live, and those of all pairs that the
    rows have seen. Both are read from the device when they are asked for.
    """

    cache: "Cache"

    @property
    def allocated(self) -> int:
        return int(self)

    @property
    def live(self) -> int:
        return int(np.asarray(self.cache.live_counts, np.int64).sum()) * self.cache.pair_bytes

    @property
    def dense(self) -> int:
        heads = self.cache.num_layers * self.cache.live_counts.shape[2]
        return int(np.asarray(self.cache.seen, np.int64).sum()) * heads * self.cache.pair_bytes


class Cache(ABC):
    """Keys and values of all layers. Every cache is a frozen dataclass and an immutable pytree."""

    if TYPE_CHECKING:  # fields of each dataclass, in an order of its own

        @property
        def seen(self) -> Int[Array, "B"]:
            """Tokens of each row so far, which is the position of the next one."""

        @property
        def policy(self) -> Any:
            """A `policies.CachePolicy`, static under jit; `core` may not import `policies`."""

        @property
        def overflow(self) -> Overflow:
            """The rule when there is no room for a pair."""

        @property
        def bounds(self) -> HostBounds | None:
            """Set by `with_bounds`; None if unknown."""

        @property
        def history(self) -> TokenHistory | None:
            """Set by `with_history`; None if unknown."""

    def with_bounds(self, bounds: HostBounds) -> Self:
        """Return this cache with the given bounds.

        Bounds and history are not part of the pytree, and `replace` drops them, so they never outlive the arrays that
        they describe.
        """
        return self._knowing(bounds, self.history)

    def with_history(self, history: TokenHistory | None) -> Self:
        """Return this cache with the given history of its tokens, or with none if they are unknown."""
        return self._knowing(self.bounds, history)

    def _knowing(self, bounds: HostBounds | None, history: TokenHistory | None) -> Self:
        known = replace(self)  # pyrefly: ignore[bad-specialization]
        object.__setattr__(known, "bounds", bounds)
        object.__setattr__(known, "history", history)
        return known

    @property
    def batch_size(self) -> int:
        return self.seen.shape[0]

    @property
    def bytes(self) -> CacheBytes:
        """Memory of all arrays, including the bookkeeping."""
        size = CacheBytes(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self)))
        size.cache = self
        return size

    def __repr__(self) -> str:
        """Say in one line what the cache holds, also where its arrays are traced, abstract or given away."""
        name = type(self).__name__
        if not hasattr(self.seen, "shape"):  # a tree of something other than arrays
            return f"{name}(...)"
        heads, room = self.described_room()
        budget = getattr(self.policy, "budget", None)
        policy = type(self.policy).__name__ + ("" if budget is None else f"({budget})")
        live, leaves = "not known here", jax.tree.leaves(self)
        if all(isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            if any(leaf.is_deleted() for leaf in leaves):
                live = "given to a newer cache"
            elif all(leaf.is_fully_addressable for leaf in leaves):
                live = f"{np.mean(np.asarray(self.live_counts)):.4g} of {np.mean(np.asarray(self.seen)):.4g} tokens"
        return (
            f"{name}({self.batch_size} rows, {self.num_layers} layers x {heads} KV heads, {room}, live {live}, "
            f"{policy}, {int(self.bytes):,} bytes)"
        )

    @abstractmethod
    def described_room(self) -> tuple[int, str]:
        """Return the number of KV heads, and what each has room for, in words."""

    @property
    @abstractmethod
    def num_layers(self) -> int: ...

    @property
    @abstractmethod
    def live_counts(self) -> Int[Array, "L B K"]:
        """Pairs that the last query of each row sees."""

    @property
    @abstractmethod
    def staying_counts(self) -> Int[Array, "L B K"]:
        """Pairs that no decision evicts."""

    @property
    @abstractmethod
    def forced_evictions(self) -> Int[Array, "L B K"]:
        """Pairs that a full buffer pushed out against the policy."""

    @property
    @abstractmethod
    def pair_bytes(self) -> int:
        """Bytes of one key and its value."""

    @abstractmethod
    def read_bounds(self) -> HostBounds:
        """Read from the device how many tokens the rows have seen, and what `HostBounds` says of this kind of cache."""

    @abstractmethod
    def layer(self, index: Any) -> Any:
        """Return what `models.attention_layer` reads and writes of one layer."""

    @abstractmethod
    def with_layer(self, index: Any, layer: Any) -> Self:
        """Return this cache with another content of one layer."""

    @abstractmethod
    def repeated(self, chains: int) -> Self:
        """Do the work of `fork`, without the history."""


AnyCache = TypeVar("AnyCache", bound=Cache)


def fork(cache: AnyCache, chains: int) -> AnyCache:
    """Repeat every row `chains` times, with the copies of a row next to each other, to sample several continuations.

    Rows of a `PagedCache` share the pages that no longer change.
    """
    if chains < 1:
        raise ConfigError(f"the number of chains must be at least 1, got {chains}")
    copies, history = cache.repeated(chains), cache.history
    if history is None:
        return copies
    rows = [row for row in range(cache.batch_size) for _ in range(chains)]
    return copies.with_history(
        TokenHistory(tuple(history.ids[row] for row in rows), tuple(history.last[row] for row in rows))
    )


def row_compression_ratios(cache: Cache) -> np.ndarray:
    """Return each row's tokens seen / mean live pairs over layers and heads; 1 for a row that has seen nothing."""
    live, seen = np.asarray(cache.live_counts, np.float64), np.asarray(cache.seen, np.float64)
    return np.where(seen > 0, seen / np.maximum(live.mean(axis=(0, 2)), 1e-9), 1.0)


def compression_ratio(cache: Cache) -> float:
    """Return the realised compression ratio, >= 1: mean tokens seen / mean live pairs over layers, rows and heads.

    It is a ratio of means, as in Model-Optimizer `cache.py`, `get_cr`.
    """
    live = np.asarray(cache.live_counts, np.float64).mean()
    return float(np.asarray(cache.seen, np.float64).mean() / live) if live else 1.0


def nominal_compression_ratio(cache: Cache) -> float:
    """Return the compression ratio without the window, >= 1: mean tokens seen / mean pairs that will never leave."""
    staying = np.asarray(cache.staying_counts).mean()
    return float(np.asarray(cache.seen, np.float64).mean() / staying) if staying else float("inf")
