"""Translate Hugging Face tensors to our parameters and back, with one table that is read in both directions.

Import reads only the slices of a layer-stacked parameter that each device holds, so host memory holds one shard of one
parameter at a time. Export reads the table backwards and gives the same bits. Begin with `WEIGHTS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dms_jax.config import ModelConfig
from dms_jax.errors import ConfigError
from dms_jax.hf.safetensors_files import Tensors, Write, row_chunks, shorten
from dms_jax.hf.weight_values import refuse_non_finite
from dms_jax.models.decoder import Decoder
from dms_jax.models.parameters import ModelStructure, abstract_model, flatten
from dms_jax.sharding import named_sharding

# HF name ({} = layer) -> (our path, axes in the file -> axes of ours without L). Axis letters: dms_jax/axes.py.
WEIGHTS = {
    "model.embed_tokens.weight": ("embed", "V D -> V D"),
    "model.layers.{}.input_layernorm.weight": ("layers.attention_norm", "D -> D"),
    "model.layers.{}.self_attn.q_proj.weight": ("layers.attention.q", "(N H) D -> D N H"),
    "model.layers.{}.self_attn.k_proj.weight": ("layers.attention.k", "(K H) D -> D K H"),
    "model.layers.{}.self_attn.v_proj.weight": ("layers.attention.v", "(K H) D -> D K H"),
    "model.layers.{}.self_attn.o_proj.weight": ("layers.attention.o", "D (N H) -> N H D"),
    "model.layers.{}.self_attn.q_proj.bias": ("layers.attention.q_bias", "(N H) -> N H"),
    "model.layers.{}.self_attn.k_proj.bias": ("layers.attention.k_bias", "(K H) -> K H"),
    "model.layers.{}.self_attn.v_proj.bias": ("layers.attention.v_bias", "(K H) -> K H"),
    "model.layers.{}.self_attn.o_proj.bias": ("layers.attention.o_bias", "D -> D"),
    "model.layers.{}.self_attn.q_norm.weight": ("layers.attention.q_norm", "H -> H"),
    "model.layers.{}.self_attn.k_norm.weight": ("layers.attention.k_norm", "H -> H"),
    "model.layers.{}.self_attn.dms_proj_alpha_norm.weight": ("layers.attention.evict_norm", "D -> D"),
    "model.layers.{}.self_attn.dms_proj_alpha.weight": ("layers.attention.evict_proj", "K D -> D K"),
    "model.layers.{}.self_attn.dms_proj_alpha.bias": ("layers.attention.evict_bias", "K -> K"),
    "model.layers.{}.post_attention_layernorm.weight": ("layers.mlp_norm", "D -> D"),
    "model.layers.{}.mlp.gate_proj.weight": ("layers.mlp.gate", "F D -> D F"),
    "model.layers.{}.mlp.up_proj.weight": ("layers.mlp.up", "F D -> D F"),
    "model.layers.{}.mlp.down_proj.weight": ("layers.mlp.down", "D F -> F D"),
    "model.layers.{}.mlp.gate_proj.bias": ("layers.mlp.gate_bias", "F -> F"),
    "model.layers.{}.mlp.up_proj.bias": ("layers.mlp.up_bias", "F -> F"),
    "model.layers.{}.mlp.down_proj.bias": ("layers.mlp.down_bias", "D -> D"),
    "model.norm.weight": ("final_norm", "D -> D"),
    "lm_head.weight": ("head", "V D -> V D"),
}
EVICT = ".dms_proj_alpha"  # marks a tensor of the evict head
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Layout:
    """The axes of one tensor in the file and in our parameter.

    `axes` is the text in the table; `sizes` gives the length of the axis for each letter.
    """

    axes: str
    sizes: tuple[tuple[str, int], ...]

    @cached_property
    def sides(self) -> tuple[list[str], list[str]]:
        """The axes in the file, a merged pair as two letters ("NH"), and our axes."""
        file, ours = self.axes.split(" -> ")
        return file.replace("(N H)", "NH").replace("(K H)", "KH").split(), ours.split()

    def _size(self, letters: str) -> int:
        return int(np.prod([dict(self.sizes)[letter] for letter in letters]))

    @property
    def file_shape(self) -> tuple[int, ...]:
        return tuple(map(self._size, self.sides[0]))

    def file_index(self, ours: tuple[slice, ...]) -> tuple[slice, ...]:
        """Return the slice of the file tensor that holds a slice of our parameter.

        Only the outer axis of a merged pair may be sharded.
        """
        spans = {letter: part.indices(self._size(letter))[:2] for letter, part in zip(self.sides[1], ours, strict=True)}
        index = []
        for letters in self.sides[0]:
            (start, stop), inner = spans[letters[0]], self._size(letters[1:])
            assert all(spans[x] == (0, self._size(x)) for x in letters[1:]), f"{self.axes}: head_dim is never split"
            index.append(slice(start * inner, stop * inner))
        return tuple(index)

    def to_ours(self, part: np.ndarray) -> np.ndarray:
        """Return a file tensor, or a slice of one, in our axes, as a view."""
        file, ours = self.sides
        split = [n for size, letters in zip(part.shape, file, strict=True) for n in self._split(size, letters)]
        letters = "".join(file)
        return part.reshape(split).transpose([letters.index(x) for x in ours])

    def to_file(self, ours: np.ndarray) -> np.ndarray:
        """Return our tensor in the axes of the file, contiguous: the inverse of `to_ours`."""
        letters = "".join(self.sides[0])
        return np.ascontiguousarray(ours.transpose([self.sides[1].index(x) for x in letters])).reshape(self.file_shape)

    def _split(self, size: int, letters: str) -> list[int]:
        inner = self._size(letters[1:])
        return [size // inner, *(self._size(x) for x in letters[1:])]


@dataclass(frozen=True)
class Entry:
    """One of our parameters and the file tensors that it consists of: one per layer if `stacked`, else only one."""

    path: str
    names: tuple[str, ...]
    layout: Layout
    stacked: bool

    @property
    def evict(self) -> bool:
        """Whether the parameter belongs to the evict head, not to the base."""
        return EVICT in self.names[0]


@lru_cache
def entries(config: ModelConfig) -> tuple[Entry, ...]:
    """List the parameters of a model with this config, in the order of the table."""
    sizes = tuple(
        zip(
            "VDNKHF",
            (
                config.vocab_size,
                config.hidden_size,
                config.num_q_heads,
                config.num_kv_heads,
                config.head_dim,
                config.intermediate_size,
            ),
            strict=True,
        )
    )
    has = flatten(abstract_model(config, jnp.float32)).keys()
    found = []
    for name, (path, axes) in WEIGHTS.items():
        if path in has:
            names = tuple(name.format(i) for i in range(config.num_layers)) if "{}" in name else (name,)
            found.append(Entry(path, names, Layout(axes, sizes), "{}" in name))
    assert {entry.path for entry in found} == has, f"parameters without a table entry: {has - {e.path for e in found}}"
    return tuple(found)


def read_model(
    tensors: Tensors,
    config: ModelConfig,
    dtype: jnp.dtype,
    mesh: Mesh | None,
    fresh_evict_head: bool,
    allow_non_finite: bool = False,
) -> Decoder:
    """Build a Decoder from named tensors, sharded over `mesh` from the start.

    Args:
      dtype: the dtype of the base; the evict head is fp32.
      fresh_evict_head: the file has no evict head, so start one that never evicts.
      allow_non_finite: read NaN, infinities and numbers that overflow as they are.

    Raises:
      ConfigError: tensors are missing, extra, of the wrong shape or not finite; the message names them.
    """
    table = entries(config)
    from_file = [entry for entry in table if not (fresh_evict_head and entry.evict)]
    check_tensors(tensors, config, from_file)
    structure, params = ModelStructure(abstract_model(config, dtype)), {}
    for entry in table:
        variable = structure.variables[entry.path]
        placement = _Placement(variable, mesh)
        if entry in from_file:
            params[entry.path] = placement.build(_reader(tensors, entry, variable, allow_non_finite))
        else:
            fill = 1.0 if entry.path.endswith("norm") else 0.0
            params[entry.path] = placement.build(
                lambda index, v=variable, fill=fill: np.full(_extent(index, v.shape), fill, v.dtype)
            )
    return structure.build(params)


def with_evict_head(model: Decoder, tensors: Tensors, config: ModelConfig, allow_non_finite: bool = False) -> Decoder:
    """Build a model of `config` that shares every base array with `model` and reads its evict head from `tensors`."""
    table = [entry for entry in entries(config) if entry.evict]
    check_tensors(tensors, config, table)
    sharding = model.embed[...].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    assert mesh is None or isinstance(mesh, Mesh)  # not an abstract mesh, because the arrays exist
    structure, head = ModelStructure(abstract_model(config, model.embed[...].dtype)), {}
    for entry in table:
        variable = structure.variables[entry.path]
        head[entry.path] = _Placement(variable, mesh).build(_reader(tensors, entry, variable, allow_non_finite))
    return structure.build(flatten(model), head)  # replaces the evict head of `model`, if it has one


def check_tensors(tensors: Tensors, config: ModelConfig, table: Sequence[Entry]) -> None:
    """Refuse files whose tensors are not exactly those of `table`.

    An extra tensor means that the file belongs to another kind of model.
    """
    expected = {name: entry.layout.file_shape for entry in table for name in entry.names}
    present = {
        name for name in tensors.names() if not name.endswith("rotary_emb.inv_freq")
    }  # recomputed from config.json
    missing, extra = sorted(expected.keys() - present), sorted(present - expected.keys())
    if config.tie_word_embeddings and HEAD in extra and EMBED in present:
        extra.remove(HEAD)
        _check_tied(tensors)
    if missing:
        raise ConfigError(f"{tensors.where} lacks {len(missing)} tensors: {shorten(missing)}" + _hint(missing, extra))
    if extra:
        policy = any(EVICT in name for name in extra)
        raise ConfigError(
            f"{tensors.where} has {len(extra)} tensors that its configuration does not ask for: {shorten(extra)}"
            + ("; for an evict head set dms_separate_alpha to true in config.json" if policy else "")
        )
    for name, shape in expected.items():
        got = tensors.shape(name)
        if got != shape:
            padded = name in (EMBED, HEAD) and len(got) == 2 and got[1] == shape[1] and got[0] > shape[0]
            raise ConfigError(
                f"tensor {name} in {tensors.where} must have shape {list(shape)}, got {list(got)}"
                + (f"; the vocabulary is padded: set vocab_size in config.json to {got[0]}" if padded else "")
            )
        tensors.dtype(name)


def _hint(missing: list[str], extra: list[str]) -> str:
    if missing == [HEAD]:
        return "; if it shares the embedding, set tie_word_embeddings to true in config.json"
    return f"; it has {shorten(extra)} instead" if extra else ""


def _check_tied(tensors: Tensors) -> None:
    """Refuse a tied model whose head differs from its embedding. An equal copy of the embedding is harmless."""
    shape = tensors.shape(EMBED)
    same = tensors.shape(HEAD) == shape and all(
        np.array_equal(tensors.read(EMBED, index), tensors.read(HEAD, index))
        for index in row_chunks(shape, tensors.dtype(EMBED).itemsize)
    )
    if not same:
        raise ConfigError(
            f"{tensors.where}: tie_word_embeddings is true in config.json, but {HEAD} differs from {EMBED}; "
            f"set it to false to keep both"
        )


def _reader(
    tensors: Tensors, entry: Entry, variable: nnx.Variable, allow_non_finite: bool
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Make a function that reads the block of one parameter at an index, layer by layer."""

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = tensors.read(name, entry.layout.file_index(index))
        if not allow_non_finite:
            refuse_non_finite(name, part, tensors.where)
        return entry.layout.to_ours(part)

    def block(index: tuple[slice, ...]) -> np.ndarray:
        if not entry.stacked:
            return read(entry.names[0], index).astype(variable.dtype)
        out = np.empty(_extent(index, variable.shape), variable.dtype)
        for row, name in enumerate(entry.names[index[0]]):
            out[row] = read(name, index[1:])
        return out

    return block


class _Placement:
    """The devices that hold the shards of one parameter."""

    def __init__(self, variable: nnx.Variable, mesh: Mesh | None):
        self.shape = variable.shape
        self.sharding = None if mesh is None else named_sharding(variable.get_metadata("axes"), variable.shape, mesh)

    def build(self, block) -> jax.Array:
        """Build the array from `block(index)`.

        Each shard is copied to its devices before the next is read; `jax.make_array_from_callback` would hold every
        local shard on the host at once.
        """
        if self.sharding is None:
            return jnp.asarray(block((slice(None),) * len(self.shape)))
        devices_of: dict[tuple, list[jax.Device]] = {}
        for device, index in self.sharding.addressable_devices_indices_map(self.shape).items():
            assert index is not None  # an addressable device always has an index
            spans = tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))
            devices_of.setdefault(spans, []).append(device)
        shards = []
        for spans, devices in devices_of.items():
            host = block(tuple(slice(*span) for span in spans))
            shards += [jax.device_put(host, device) for device in devices]
            jax.block_until_ready(shards[-len(devices) :])
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, shards)


def _extent(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))


def model_writes(model: Decoder, dtype_of=lambda name, ours: ours, untouched=None) -> list[Write]:
    """List every tensor of a model under its Hugging Face name. The values are made only when they are written.

    Args:
      dtype_of: `dtype_of(name, ours)` chooses the dtype in the file.
      untouched: `untouched(name, value)` may return the source's own bits for a tensor that only loading has rounded.
    """
    params = flatten(model)
    writes = []
    for entry in entries(model.config):
        array = params[entry.path]
        for layer, name in enumerate(entry.names):
            dtype = np.dtype(dtype_of(name, array.dtype))

            def value(array=array, layer=layer, name=name, entry=entry, dtype=dtype):
                host = entry.layout.to_file(to_host(_of_layer(array, layer) if entry.stacked else array))
                original = untouched(name, host) if untouched is not None else None
                return host.astype(dtype) if original is None else original

            writes.append(Write(name, entry.layout.file_shape, dtype, value))
    return writes


@jax.jit
def _of_layer(stacked: jax.Array, layer: int) -> jax.Array:
    """Return one layer of a stacked array: one program for each shape, where plain indexing compiles several."""
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def to_host(array: jax.Array) -> np.ndarray:
    """Return the whole array as NumPy, even if other processes hold parts of it."""
    if not array.is_fully_addressable:
        assert isinstance(array.sharding, NamedSharding)  # the only kind that this package makes on a mesh
        replicated = NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
        array = jax.jit(lambda x: x, out_shardings=replicated)(array)
    return np.asarray(array)
