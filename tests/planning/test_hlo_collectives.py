"""Tests of planning.hlo_collectives: the forms that XLA prints, and programs with known collectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dms_jax.planning.hlo_collectives import Collective, collectives

HEADER = "HloModule m, is_scheduled=true, num_partitions=8\n\n"
ADD = """%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

"""


def found(text) -> dict[str, Collective]:
    return {c.name: c for c in collectives(HEADER + text)}


def test_groups_shapes_and_starts_are_read_in_every_form():
    got = found(
        ADD
        + """ENTRY %main (p: bf16[4,256], q: f8e4m3fn[16]) -> bf16[4,256] {
  %p = bf16[4,256]{1,0:T(8,128)(2,1)} parameter(0)
  %q = f8e4m3fn[16]{0} parameter(1)
  %listed = bf16[8,256]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, \
replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %iota = bf16[1,256]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, to_apply=%add
  %named = bf16[4,256]{1,0} all-reduce(%p), \
replica_groups=mesh['data'=2,'model'=2,'context'=2] {'data','context'}, to_apply=%add
  %part = bf16[4,256]{1,0} all-reduce(%p), replica_groups=mesh['x'=8] {'x':(1)2}, to_apply=%add
  %all = f8e4m3fn[16]{0} all-to-all(%q), replica_groups={}, dimensions={0}
  %ring = bf16[4,256]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
  %start = ((bf16[4,256]{1,0}, f8e4m3fn[16]{0}), (bf16[16,256]{1,0}, /*index=1*/f8e4m3fn[64]{0})) \
all-gather-start(%p, %q), replica_groups=[2,4]<=[8]
  %done = (bf16[16,256]{1,0}, f8e4m3fn[64]{0}) all-gather-done(%start)
  ROOT %r = bf16[4,256]{1,0} add(%ring, %named)
}
"""
    )
    assert {name: (c.kind, c.bytes, c.group_size, c.shapes, c.sent) for name, c in got.items()} == {
        "listed": ("all-gather", 2048, 2, ((8, 256),), 2048),
        "iota": ("reduce-scatter", 2048, 4, ((1, 256),), 1536),
        "named": ("all-reduce", 2048, 4, ((4, 256),), 3072),
        "part": ("all-reduce", 2048, 2, ((4, 256),), 2048),
        "all": ("all-to-all", 16, 8, ((16,),), 14),
        "ring": ("collective-permute", 2048, 2, ((4, 256),), 2048),
        "start": ("all-gather", 2064, 4, ((16, 256), (64,)), 3 * 2064),
    }
    assert all(c.executions == 1 and c.loops == 0 for c in got.values())


def loop(name, body, attributes=""):
    return f"  %{name} = (s32[], f32[8]) while(%state), condition=%below_{name}, body=%{body}{attributes}\n"


def test_nested_loops_multiply_and_unstated_trip_counts_come_from_the_condition():
    known = ', backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}'
    state = "(state: (s32[], f32[8])) -> (s32[], f32[8]) {\n  %state = (s32[]{:T(128)}, f32[8]) parameter(0)\n"
    condition = (
        "(state: (s32[], f32[8])) -> pred[] {\n  %limit = s32[]{:T(128)} constant(3)\n"
        "  %state = (s32[], f32[8]) parameter(0)\n"
    )
    condition += (
        "  %i = s32[] get-tuple-element(%state), index=0\n  ROOT %lt = pred[] compare(%i, %limit), direction=LT\n}\n"
    )
    unknown = condition.replace("%limit)", "%other)").replace("constant(3)", "parameter(1)")
    gather = (
        "  %x = f32[8] get-tuple-element(%state), index=1\n  %g{} = f32[64] all-gather(%x), replica_groups=[1,8]<=[8]\n"
    )
    got = found(
        f"%inner {state}{gather.format(1)}  ROOT %t = (s32[], f32[8]) tuple(%i, %x)\n}}\n"
        f"%below_a {condition}%below_b {condition}%below_c {unknown}"
        f"%outer {state}{gather.format(2)}{loop('a', 'inner')}  ROOT %t = (s32[], f32[8]) tuple(%i, %x)\n}}\n"
        f"%free {state}{gather.format(3)}  ROOT %t = (s32[], f32[8]) tuple(%i, %x)\n}}\n"
        f"ENTRY %main {state}{loop('b', 'outer', known)}{loop('c', 'free')}  ROOT %x = f32[8] get-tuple-element(%b), "
        f"index=1\n}}\n"
    )
    assert {name: (c.executions, c.loops) for name, c in got.items()} == {"g1": (15, 2), "g2": (5, 1), "g3": (1, 1)}


def test_called_computations_count_and_a_collective_in_several_fusions_counts_once():
    def part(number, channel, chain):
        gather = (
            f"all-gather(%x), channel_id={channel}, replica_groups=[1,8]<=[8], "
            f'frontend_attributes={{chain_id="{chain}"}}'
        )
        return (
            f"%f{number} (x: f32[8]) -> f32[64] {{\n  %x = f32[8] parameter(0)\n"
            f"  ROOT %g{number} = f32[64] {gather}\n}}\n"
        )

    got = found(
        part(1, 7, 0)
        + part(2, 7, 0)
        + part(3, 8, 1)
        + ADD
        + """%branch (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  ROOT %r = f32[8] all-reduce(%x), to_apply=%add
}
%all-reduce-scatter.3.clone (x: f32[8]) -> f32[1] {
  %x = f32[8] parameter(0)
  %rs = f32[8] all-reduce(%x), to_apply=%add
  ROOT %r = f32[1] dynamic-slice(%rs, %zero), dynamic_slice_sizes={1}
}
ENTRY %main (p: f32[8], b: s32[]) -> f32[64] {
  %t = f32[1] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3.clone
  %p = f32[8] parameter(0)
  %b = s32[] parameter(1)
  %a1 = f32[64] fusion(%p), kind=kLoop, calls=%f1
  %a2 = f32[64] fusion(%p), kind=kLoop, calls=%f2
  %a3 = f32[64] fusion(%p), kind=kLoop, calls=%f3
  %c = f32[8] conditional(%b, %p, %p), branch_computations={%branch, %branch}
  ROOT %s = f32[64] add(%a1, %a2)
}
"""
    )
    assert sorted(got) == ["g1", "g3", "r", "rs"] and got["r"].group_size == 8
    assert got["r"].kind == "all-reduce" and got["rs"].kind == "reduce-scatter"


def test_text_without_an_entry_computation_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("fn main() {}")


def test_scan_over_sharded_weights_gathers_one_layer_at_a_time():
    """The weights of 24 layers, [64, 64] fp32, over 4 x 2 devices: every collective is known to the byte."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    weights = jax.ShapeDtypeStruct((24, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "data", "model")))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P("data", None)))

    def f(x, weights):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P(None, "model")))
            y = jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(mesh, P("data", "model")))
            return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P("data", None))), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    with jax.set_mesh(mesh):
        got = collectives(jax.jit(f).lower(x, weights).compile().as_text())
    inside = sorted((c.kind, c.bytes, c.group_size, c.executions) for c in got if c.loops)
    assert inside == [("all-gather", 2 * 32 * 4, 2, 24), ("all-gather", 16 * 32 * 4, 4, 24)]
    assert [(c.kind, c.bytes, c.group_size) for c in got if not c.loops] == [("all-reduce", 4, 4)]
