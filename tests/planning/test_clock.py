"""The clock against sums by hand, on a text with a line or two of each kind."""

import dataclasses

import pytest

from sa_jax.parallel.hardware import CHIPS
from sa_jax.planning.clock import ATTENTION_SHARE, read_clock
from sa_jax.planning.collectives import Traffic, read_collectives

# Round numbers: a thousand cycles are a microsecond, and a million bytes arrive in one.
CHIP = dataclasses.replace(
    next(chip for chip in CHIPS if chip.name == "v5p"),
    clock_hz=1e9,
    link_bandwidth=1e12 / 3,
    flops=1e15,
)

TEXT = """HloModule jit_step, is_scheduled=true

%fused.1 (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {
  %inner = bf16[8,8]{1,0} fusion(%a), kind=kLoop, calls=%fused.2
  ROOT %product = bf16[8,8]{1,0} convolution(%inner, %b), dim_labels=bf_io->bf
}

%fused.2 (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %turned = bf16[8,8]{1,0} transpose(%a), dimensions={1,0}
}

%fused.3 (a: bf16[8,8]) -> bf16[8,8] {
  ROOT %twice = bf16[8,8]{1,0} add(%a, %a)
}

%fused.4 (a: bf16[8,8], b: bf16[500,1000]) -> bf16[8,8] {
  %gathered = bf16[1000,1000]{1,0} all-gather(%b), replica_groups={{0,1}}, dimensions={0}
  ROOT %product.2 = bf16[8,8]{1,0} convolution(%a, %gathered), dim_labels=bf_io->bf
}

%inner_condition (p: (s32[])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(3)
  ROOT %less.1 = pred[] compare(%counter, %limit.1), direction=LT
}

%inner_body (p: (s32[])) -> (s32[]) {
  %moved = bf16[8,8]{1,0:T(8,128)(2,1)} copy(%x), backend_config={"estimated_cycles":"1000"}
}

%outer_condition (p: (s32[])) -> pred[] {
  %limit.2 = s32[]{:T(128)} constant(5)
  ROOT %less.2 = pred[] compare(%counter, %limit.2), direction=LT
}

%outer_body (p: (s32[])) -> (s32[]) {
  %permute-start = (bf16[1000,1000]{1,0}, bf16[1000,1000]{1,0}, u32[], u32[]) \
collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %gather-start = (bf16[1000,500]{1,0}, bf16[1000,1000]{1,0}) all-gather-start(%x), \
replica_groups={{0,1}}, dimensions={1}
  %beside = bf16[8,8]{1,0} fusion(%x, %y), kind=kOutput, calls=%fused.1, \
backend_config={"estimated_cycles":"2500"}
  %permute-done = bf16[1000,1000]{1,0} collective-permute-done(%permute-start), \
metadata={op_name="jit(step)/x"}
  %gather-done = bf16[1000,1000]{1,0} all-gather-done(%gather-start)
  %turned = bf16[8,8]{1,0} fusion(%x), kind=kLoop, calls=%fused.2, \
backend_config={"window_config":{"estimated_cycles":"10"}}
  %while.2 = (s32[]) while(%tuple.2), condition=%inner_condition, body=%inner_body
}

%small (p: bf16[8,8]) -> bf16[8,8] {
  ROOT %doubled.1 = bf16[8,8]{1,0} fusion(%p), kind=kLoop, calls=%fused.3, \
backend_config={"estimated_cycles":"7000"}
}

%large (p: bf16[8,8]) -> bf16[8,8] {
  ROOT %doubled.2 = bf16[8,8]{1,0} fusion(%p), kind=kLoop, calls=%fused.3, \
backend_config={"estimated_cycles":"90000"}
}

ENTRY %main.2 (p: bf16[8,8]) -> bf16[8,8] {
  %while.1 = (s32[]) while(%tuple.1), condition=%outer_condition, body=%outer_body
  %reduce = f32[1000,250]{1,0} all-reduce(%z), replica_groups=[2,4]<=[8], to_apply=%add
  %scatter = f32[1000,250]{1,0} reduce-scatter(%z), replica_groups=[2,4]<=[8], to_apply=%add
  %splash_mha_fwd_residuals.1 = (f32[8]{0}, bf16[2,4,1000,100]{3,2,1,0}) custom-call(%i, %q), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1,1]{2,1,0}, \
bf16[2,4,1000,100]{3,2,1,0}}
  %splash_mha_dkv_no_residuals.1 = (f32[8]{0}, bf16[8,1000,100]{2,1,0}) custom-call(%i, %q), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1,1]{2,1,0}, \
bf16[8,1000,100]{2,1,0}}
  %fused_gather = bf16[8,8]{1,0} fusion(%x, %y), kind=kOutput, calls=%fused.4, \
backend_config={"estimated_cycles":"800"}
  %bounds = s32[8]{0} custom-call(%i), custom_call_target="AssumeGatherIndicesInBound"
  ROOT %either = bf16[8,8]{1,0} conditional(%flag, %p, %p), \
branch_computations={%small, %large}
}
"""

# As libtpu writes them: on SparseCores with jax 0.10 (%one) and 0.12 (%two); in parts that are in
# several fusions (%three); an all-reduce of which one half is kept (%four).
BESIDE = """HloModule jit_step, is_scheduled=true

%on_sparse_core (p: bf16[500,1000], q: bf16[250,1000]) -> (bf16[1000,1000], bf16[500,1000]) {
  %gathered = bf16[1000,1000]{1,0} all-gather(%p), channel_id=1, \
replica_groups={{0,1}}, dimensions={0}
  %half = bf16[500,1000]{1,0} all-gather(%q), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %both = (bf16[1000,1000]{1,0}, bf16[500,1000]{1,0}) tuple(%gathered, %half)
}, execution_thread="sparsecore"

%first (p: bf16[500,1000]) -> bf16[1000,1000] {
  %part.1 = bf16[1000,1000]{1,0} all-gather(%p), channel_id=4, replica_groups={{0,1}}, \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%first_of_other (p: bf16[500,1000]) -> bf16[1000,1000] {
  %part.4 = bf16[1000,1000]{1,0} all-gather(%p), channel_id=5, replica_groups={{0,1}}, \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%second (p: bf16[500,1000], a: bf16[8,8]) -> bf16[8,8] {
  %part.2 = bf16[1000,1000]{1,0} all-gather(%p), channel_id=4, replica_groups={{0,1}}, \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %product.1 = bf16[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf
}

%last (p: bf16[500,1000]) -> bf16[1000,1000] {
  %part.3 = bf16[1000,1000]{1,0} all-gather(%p), channel_id=4, replica_groups={{0,1}}, \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%last_of_other (p: bf16[500,1000]) -> bf16[1000,1000] {
  %part.5 = bf16[1000,1000]{1,0} all-gather(%p), channel_id=5, replica_groups={{0,1}}, \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.1.clone (z: bf16[1000,1000]) -> bf16[500,1000] {
  %sum = bf16[1000,1000]{1,0} all-reduce(%z), channel_id=6, replica_groups={{0,1}}, to_apply=%add
  ROOT %kept = bf16[500,1000]{1,0} dynamic-slice(%sum, %i, %j), dynamic_slice_sizes={500,1000}
}

ENTRY %main.2 (p: bf16[500,1000]) -> bf16[1000,1000] {
  %one.call-start = ((bf16[500,1000]{1,0}, token[]), bf16[1000,1000]{1,0}) \
call-start(%p, %ready), async_execution_thread="sparsecore", to_apply=%on_sparse_core
  %product.2 = bf16[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf, \
backend_config={"estimated_cycles":"400"}
  %one.call-done = bf16[1000,1000]{1,0} call-done(%one.call-start), metadata={op_name="x"}
  %two.call-start = ((), (), (s32[1]{0})) call-start(), \
async_execution_thread="sparsecore", to_apply=%on_sparse_core
  %product.3 = bf16[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf, \
backend_config={"estimated_cycles":"500"}
  %two.call-update = ((bf16[500,1000]{1,0}), bf16[1000,1000]{1,0}) \
call-update(%two.call-start, %p)
  %product.4 = bf16[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf, \
backend_config={"estimated_cycles":"300"}
  %two.call-done = bf16[1000,1000]{1,0} call-done(%two.call-update), metadata={op_name="x"}
  %async-collective-start = (bf16[500,1000]{1,0}, bf16[1000,1000]{1,0}) fusion(%p), \
kind=kCustom, calls=%first
  %async-collective-start.1 = (bf16[500,1000]{1,0}, bf16[1000,1000]{1,0}) fusion(%p), \
kind=kCustom, calls=%first_of_other
  %three = (bf16[8,8]{1,0}, bf16[1000,1000]{1,0}) fusion(%p, %a), kind=kOutput, \
calls=%second, backend_config={"estimated_cycles":"200"}
  %async-collective-done = bf16[1000,1000]{1,0} fusion(%p), kind=kCustom, calls=%last
  %product.5 = bf16[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf, \
backend_config={"estimated_cycles":"100"}
  %async-collective-done.1 = bf16[1000,1000]{1,0} fusion(%p), kind=kCustom, calls=%last_of_other
  ROOT %four = bf16[500,1000]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1.clone
}
"""


def test_what_is_sent_beside_products_waits_for_what_is_left_of_it():
    clock = read_clock(BESIDE, CHIP)
    assert clock.products == pytest.approx((0.4 + 0.5 + 0.3 + 0.2 + 0.1) * 1e-6)
    # One and two bring 1.5 MB each in 1.5 us, 0.4 and 0.3 us of products beside them. The two in
    # parts bring 1 MB each, one after the other, with 0.2 and then 0.1 us beside them. Of the sum a
    # device receives 1 MB.
    assert clock.collectives == pytest.approx((1.1 + 1.2 + 0.8 + 0.9 + 1) * 1e-6)
    assert read_collectives(BESIDE) == {
        "all-gather": Traffic(6, 2 * 3_000_000 + 2 * 2_000_000),
        "reduce-scatter": Traffic(1, 2_000_000),
    }


def test_every_kind_is_as_by_hand():
    clock = read_clock(TEXT, CHIP)
    assert clock.products == pytest.approx(5 * 2.5e-6 + 0.8e-6)
    assert clock.copies == pytest.approx(5 * (3 * 1e-6 + 0.01e-6))
    assert clock.fusions == pytest.approx(7e-6)
    # Two products forward of 2 rows x 4 heads, and four for dK and dV of one row's 8 heads, each
    # half of 1000 x 1000 scores.
    flops = (2 + 4) * 2 * 8 * 1000**2 * 100 / 2
    assert clock.attention == pytest.approx(flops / (1e15 * ATTENTION_SHARE))
    # A turn: 2 MB permuted, then half of 2 MB gathered, beside a product of 2.5 us. An all-reduce
    # of 1 MB sends 3/4 of it twice, a reduce-scatter of 4 x 1 MB 3/4 of it once. The gather in a
    # fusion brings 1 MB beside 0.8 us of product.
    assert clock.collectives == pytest.approx((5 * (2 + 1 - 2.5) + 2 * 0.75 + 3 + 0.2) * 1e-6)
    assert clock.conditionals == 1
    assert clock.step == pytest.approx(
        clock.products + clock.attention + clock.fusions + clock.copies + clock.collectives
    )


@pytest.mark.parametrize("cycles", [0, 3000])
def test_cycles_of_a_splash_kernel_count_where_the_text_has_them_and_of_no_other_call(cycles):
    config = 'backend_config={"estimated_cycles":"%d"}'
    text = TEXT.replace("custom-call(%i, %q)", f"custom-call(%i, %q), {config % cycles}")
    text = text.replace("custom-call(%i),", f"custom-call(%i), {config % 9000},")
    before, clock = read_clock(TEXT, CHIP), read_clock(text, CHIP)
    assert clock.attention == pytest.approx(2 * cycles * 1e-9)
    assert dataclasses.replace(clock, attention=before.attention) == before


def test_a_conditional_takes_the_branch_that_is_asked_for():
    cheap, dear = read_clock(TEXT, CHIP), read_clock(TEXT, CHIP, branch=max)
    assert dear.step - cheap.step == pytest.approx(83e-6)
