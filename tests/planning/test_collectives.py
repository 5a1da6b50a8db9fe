import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.parallel.mesh import make_mesh
from sa_jax.planning.collectives import Traffic, read_collectives


def test_a_loop_counts_as_often_as_it_turns():
    """Weights [L, 16, 16] cut over fsdp are gathered once a layer: L gathers of 16 x 16 floats."""
    mesh = make_mesh(fsdp=8)
    rows, weights = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P(None, "fsdp"))

    def layers(x, stack):
        def layer(x, w):
            # Summed over the rows, which are cut: one all-reduce of the whole, after the loop.
            return jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(layer, x, stack)
        return jnp.sum(x, axis=0)

    run = jax.jit(layers, out_shardings=NamedSharding(mesh, P()))
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=rows)
    stack = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=weights)
    found = read_collectives(run.lower(x, stack).compile().as_text())
    assert found["all-gather"] == Traffic(5, 5 * 16 * 16 * 4)
    assert found["all-reduce"] == Traffic(1, 16 * 4)
    assert found.keys() == {"all-gather", "all-reduce"}


TPU_TEXT = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%condition.1 (param.1: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(80)
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

%body.1 (param.2: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %start = (bf16[2,16]{1,0:T(8,128)}, bf16[2,16]{1,0}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,0}}
  %done = bf16[2,16]{1,0} collective-permute-done(%start)
  %gather = bf16[8,16]{1,0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}
  %scatter = bf16[2,16]{1,0} reduce-scatter(%y), replica_groups={{0,1,2,3}}, to_apply=%add
  %more = bf16[4,16]{1,0} reduce-scatter(%y), replica_groups=mesh['a'=4,'b'=2], \
device_ids=([2,4]T(1,0)) {'b'}, to_apply=%add
}

ENTRY %main.2 (p: bf16[8,16]) -> bf16[8,16] {
  %send.8 = (bf16[4,16]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%x, %after), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"\
,_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send.8), channel_id=2, is_host_transfer=true
  %while.1 = (s32[], bf16[8,16]) while(%tuple), condition=%condition.1, body=%body.1
  %reduce = (f32[], f32[4]{0}) all-reduce(%z, %w), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""

# Two products' gradients, scattered together, and two weights, gathered together.
GPU_TEXT = """ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {
  %s = ((bf16[8,16]{1,0}, bf16[8,4]{1,0}), (bf16[2,16]{1,0}, bf16[2,4]{1,0})) \
reduce-scatter-start(%x, %y), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
  %g = ((bf16[2,16]{1,0}, bf16[2,4]{1,0}), (bf16[8,16]{1,0}, bf16[8,4]{1,0})) \
all-gather-start(%x, %y), replica_groups=[1,4]<=[4], dimensions={0}
  %one = (bf16[2,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%x), replica_groups=[1,4]<=[4]
  %r = (f32[8]{0}, f32[4]{0}) all-reduce-start(%z, %w), replica_groups=[1,4]<=[4], to_apply=%add
}
"""


def test_what_xla_combines_for_gpus_is_added_up():
    assert read_collectives(GPU_TEXT) == {
        "all-gather": Traffic(2, 8 * (16 + 4 + 16) * 2),
        "reduce-scatter": Traffic(1, 8 * (16 + 4) * 2),
        "all-reduce": Traffic(1, (8 + 4) * 4),
    }


@pytest.mark.parametrize(
    ("text", "a_slice", "crosses"),
    [
        ("replica_groups={{0,1},{2,3}}", 2, False),
        ("replica_groups={{0,2},{1,3}}", 2, True),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", 2, True),
        ("source_target_pairs={{0,1},{1,0}}", 2, False),
        ("replica_groups=[2,4]<=[8]", 4, False),
        ("replica_groups=[1,8]<=[8]", 4, True),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 4, True),  # 0 with 4, 1 with 5, ...
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", 4, False),  # 0 with 2, 1 with 3, 4 with 6, ...
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4, False),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", 4, True),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'c','a'}", 4, True),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", 4, False),  # 0 with 1
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'a'}", 2, False),  # 0 with 1
    ],
)
def test_the_groups_tell_what_goes_between_slices(text, a_slice, crosses):
    line = f"  ROOT %gather = f32[8] all-gather(%x), {text}, dimensions={{0}}"
    kind = "all-gather between slices" if crosses else "all-gather"
    hlo = f"ENTRY %main (x: f32[1]) -> f32[8] {{\n{line}\n}}\n"
    assert read_collectives(hlo, a_slice) == {kind: Traffic(1, 32)}
    assert read_collectives(hlo) == {"all-gather": Traffic(1, 32)}


def test_text_as_libtpu_writes_it():
    assert read_collectives(TPU_TEXT) == {
        "collective-permute": Traffic(80, 80 * 2 * 16 * 2),
        "all-gather": Traffic(80, 80 * 8 * 16 * 2),
        "reduce-scatter": Traffic(160, 80 * (2 * 4 + 4 * 2) * 16 * 2),
        "all-reduce": Traffic(1, 4 + 16),
        "all-reduce between slices": Traffic(1, 4 * 16 * 2),
    }
