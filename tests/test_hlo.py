"""What is read from the text of compiled programs: kernels, bytes moved and copied, loops."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
import hlo

KB = 1024
LAYER = "(s32[], f32[4,256]{1,0}, f32[5,256,256]{2,1,0}, f32[64,256]{1,0})"
STATE = "(s32[4]{0}, f32[1024,256]{1,0}, f32[5,256,256]{2,1,0}, /*index=3*/f32[64,256]{1,0}, pred[])"
# A decoding loop as a GPU's compiler writes it: per round a look-up, five layers whose weights are slices of one array
# (copied first), a product by a library, a cache changed in place, a branch, and a loop that the device ends.
TEXT = """
HloModule jit_f, is_scheduled=true

%lookup (table: f32[1024,256], ids: s32[4]) -> f32[4,256] {
  %table = f32[1024,256]{1,0} parameter(0)
  %ids = s32[4]{0} parameter(1)
  ROOT %rows = f32[4,256]{1,0} gather(%table, %ids), offset_dims={1}
}

%layer (w: f32[5,256,256], i: s32[]) -> f32[256,256] {
  %w = f32[5,256,256]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %slice = f32[1,256,256]{2,1,0} dynamic-slice(%w, %i, %i, %i), dynamic_slice_sizes={1,256,256}
  %flat = f32[256,256]{1,0} bitcast(%slice)
  ROOT %copy.1 = f32[256,256]{1,0} copy(%flat)
}

%write (cache: f32[64,256], new: f32[4,256], at: s32[]) -> f32[64,256] {
  %cache = f32[64,256]{1,0} parameter(0)
  %new = f32[4,256]{1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %update = f32[64,256]{1,0} dynamic-update-slice(%cache, %new, %at, %at)
}

%layers_body (p: LAYER) -> LAYER {
  %p = LAYER parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,256]{1,0} get-tuple-element(%p), index=1
  %w = f32[5,256,256]{2,1,0} get-tuple-element(%p), index=2
  %cache = f32[64,256]{1,0} get-tuple-element(%p), index=3
  %own = f32[256,256]{1,0} fusion(%w, %i), kind=kLoop, calls=%layer
  %product = (f32[4,256]{1,0}, s8[4194304]{0}) custom-call(%x, %own), custom_call_target="__cublas$gemm"
  %y = f32[4,256]{1,0} get-tuple-element(%product), index=0
  %written = f32[64,256]{1,0} fusion(%cache, %y, %i), kind=kLoop, calls=%write
  ROOT %out = LAYER tuple(%i, %y, %w, %written)
}

%layers_condition (p: LAYER) -> LAYER {
  %p = LAYER parameter(0)
  ROOT %always = pred[] constant(true)
}

%wait_body (p: (pred[])) -> (pred[]) {
  ROOT %p = (pred[]) parameter(0)
}

%wait_condition (p: (pred[])) -> pred[] {
  %p = (pred[]) parameter(0)
  ROOT %more = pred[] get-tuple-element(%p), index=0
}

%dear (x: f32[4,256]) -> f32[4,256] {
  %x = f32[4,256]{1,0} parameter(0)
  ROOT %twice = f32[4,256]{1,0} add(%x, %x)
}

%cheap (x: f32[4,256]) -> f32[4,256] {
  ROOT %x = f32[4,256]{1,0} parameter(0)
}

%round (p: STATE) -> STATE {
  %p = STATE parameter(0)
  %ids = s32[4]{0} get-tuple-element(%p), index=0
  %table = f32[1024,256]{1,0} get-tuple-element(%p), index=1
  %w = f32[5,256,256]{2,1,0} get-tuple-element(%p), index=2
  %cache = f32[64,256]{1,0} get-tuple-element(%p), index=3
  %go = pred[] get-tuple-element(%p), index=4
  %zero = s32[] constant(0)
  %x = f32[4,256]{1,0} fusion(%table, %ids), kind=kLoop, calls=%lookup
  %first = LAYER tuple(%zero, %x, %w, %cache)
  %layers = LAYER while(%first), condition=%layers_condition, body=%layers_body, TRIPS
  %y = f32[4,256]{1,0} get-tuple-element(%layers), index=1
  %after = f32[64,256]{1,0} get-tuple-element(%layers), index=3
  %kept = f32[64,256]{1,0} copy(%after)
  %z = f32[4,256]{1,0} conditional(%go, %y, %y), true_computation=%dear, false_computation=%cheap
  %ready = (pred[]) tuple(%go)
  %waited = (pred[]) while(%ready), condition=%wait_condition, body=%wait_body
  ROOT %out = STATE tuple(%ids, %table, %w, %kept, %go)
}

%go_on (p: STATE) -> STATE {
  %p = STATE parameter(0)
  ROOT %go = pred[] get-tuple-element(%p), index=4
}

ENTRY %main (ids: s32[4]) -> f32[64,256] {
  %ids = s32[4]{0} parameter(0)
  %table = f32[1024,256]{1,0} parameter(1)
  %w = f32[5,256,256]{2,1,0} parameter(2)
  %cache = f32[64,256]{1,0} parameter(3)
  %go = pred[] parameter(4)
  %state = STATE tuple(%ids, %table, %w, %cache, %go)
  %loop = STATE while(%state), condition=%go_on, body=%round
  ROOT %result = f32[64,256]{1,0} get-tuple-element(%loop), index=3
}
"""
TEXT = (
    TEXT.replace("LAYER", LAYER)
    .replace("STATE", STATE)
    .replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}')
)


def test_a_decoding_loop_is_counted_by_hand():
    program = hlo.Program(TEXT)
    work = program.work(program.outer_loop(), least=10 * KB)
    small, index = 4 * KB, 4  # bytes of four rows, and of a number
    look_up = small + 4 * index + small
    copy = 2 * 256 * KB + index
    product = small + 256 * KB + small  # the library's scratch is not moved
    write = 2 * small + index
    kept = 2 * 64 * KB
    assert work == hlo.Work(
        kernels=1 + 5 * 3 + 1,  # of the branches, the one that does nothing
        moved_bytes=look_up + 5 * (copy + product + write) + kept,
        copied_bytes=5 * 256 * KB + 64 * KB,
        dynamic_loops=1,
        conditionals=1,
    )
    assert program.work(program.outer_loop(), least=100 * KB).copied_bytes == 5 * 256 * KB


def test_memory_beside_the_main_one_is_not_counted():
    """On a TPU, what has been fetched into VMEM, S(1), is not read from memory again."""
    text = """
ENTRY %main (ids: s32[4]) -> f32[64,256] {
  %x = f32[1024]{0} parameter(0)
  %start = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0}, u32[]) copy-start(%x)
  %done = f32[1024]{0:T(1024)S(1)} copy-done(%start)
  %y = f32[1024]{0:T(1024)S(1)} negate(%done)
  ROOT %z = f32[1024]{0:T(1024)} negate(%y)
}
"""
    program = hlo.Program(text)
    assert program.work().moved_bytes == 2 * 4 * KB  # x is read, z is written
    assert program.work().kernels == 3


def compiled(function, *arguments, **options) -> hlo.Program:
    return hlo.Program(jax.jit(function, **options).lower(*arguments).compile().as_text())


@pytest.mark.parametrize("known", [True, False])
def test_loops_of_unknown_length_are_told_from_others(known):
    """In a real program for this machine; rounds of a loop of known length count."""

    def f(x, rounds):
        inner = lambda x: jax.lax.fori_loop(0, 7 if known else rounds, lambda i, x: jnp.sin(x) + i, x)
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 3, lambda x: inner(jnp.cos(x)), x)

    program = compiled(f, jnp.ones(4096), 7)
    work = program.work(program.outer_loop())
    assert work.dynamic_loops == (0 if known else 1)
    rounds = 7 if known else 1
    assert 2 * 16 * KB * (1 + rounds) <= work.moved_bytes <= 2 * 16 * KB * (1 + rounds) + 512 * (1 + rounds)


@pytest.mark.parametrize("kept", [False, True])
def test_a_cache_that_is_copied_in_a_loop_is_noticed(kept):
    """A state written in place moves what is written; one whose old value is still needed is copied every round."""
    new = jnp.ones((1, 4096))

    def f(cache, steps):
        def body(carry):
            i, cache, old = carry
            changed = jax.lax.dynamic_update_slice(cache, new * i, (i % 8, 0))
            return i + 1, changed, cache if kept else old

        return jax.lax.while_loop(lambda c: c[0] < steps, body, (0, cache, cache[:8] if kept else cache[0, :1]))

    program = compiled(f, jnp.ones((8, 4096)), 5, donate_argnums=0)
    work = program.work(program.outer_loop(), least=64 * KB)
    assert (work.copied_bytes >= 128 * KB) if kept else (work.copied_bytes == 0)
    assert (work.moved_bytes > 256 * KB) == kept


def test_weights_are_read_once_and_slices_of_them_are_slices():
    """A product reads its operands whole; a look-up reads the rows it takes."""
    table, w = jnp.ones((1000, 512)), jnp.ones((512, 512))
    work = compiled(lambda table, w, ids: table[ids] @ w, table, w, jnp.arange(4)).work()
    rows, matrix = 4 * 512 * 4, w.nbytes
    assert matrix + 2 * rows < work.moved_bytes < matrix + 6 * rows


def test_a_slice_of_what_a_fusion_inside_a_fusion_passes_on_is_a_slice():
    """A TPU's compiler reads a layer of stacked int8 matrices so, in another tiling."""
    program = hlo.Program("""
%tiling (all: s8[36,64,128]) -> s8[36,64,128] {
  %all = s8[36,64,128]{2,1,0:T(32,128)} parameter(0)
  ROOT %tiled = s8[36,64,128]{2,1,0:T(8,128)} copy(%all)
}

%product (x: bf16[16,64], w: s8[36,64,128], i: s32[]) -> bf16[16,128] {
  %x = bf16[16,64]{1,0} parameter(0)
  %w = s8[36,64,128]{2,1,0:T(32,128)} parameter(1)
  %i = s32[] parameter(2)
  %view = s8[36,64,128]{2,1,0:T(8,128)} fusion(%w), kind=kLoop, calls=%tiling
  %slice = s8[1,64,128]{2,1,0:T(8,128)} dynamic-slice(%view, %i, %i, %i), dynamic_slice_sizes={1,64,128}
  %layer = s8[64,128]{1,0:T(8,128)} bitcast(%slice)
  ROOT %y = bf16[16,128]{1,0} convolution(%x, %layer), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[16,64], w: s8[36,64,128], i: s32[]) -> bf16[16,128] {
  %x = bf16[16,64]{1,0} parameter(0)
  %w = s8[36,64,128]{2,1,0:T(32,128)} parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = bf16[16,128]{1,0} fusion(%x, %w, %i), kind=kOutput, calls=%product
}
""")
    index = 4 * 3  # the same scalar for each axis
    assert program.work().moved_bytes <= 2 * 16 * 64 + 64 * 128 + 2 * 16 * 128 + index
