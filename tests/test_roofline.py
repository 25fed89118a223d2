"""Roofline: operations and bytes of kernels on hand-made programs, and of compiled ones."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lrjax
from lrjax import roofline
from lrjax.roofline import Rates, roofline_of
from lrjax.roofline.hlo import parse
from marks import COMPILES_FOR_H200

# One second for 100 operations, for 10 bytes, for a byte to the host; half a second for a launch.
SIMPLE = Rates(
    "a device", {"half": 100.0, "float32": 100.0, "float64": 100.0}, 10.0, 1.0, 0.5, branch_s=7.0
)

FUSED = """
%fused {{
  %big = f32[100]{{0}} parameter(0)
  %start = s32[] parameter(1)
  {body}
}}
ENTRY %main {{
  %x = f32[100]{{0}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %fusion.1 = {shape} fusion(%x, %i), kind=kLoop, calls=%fused, metadata={{op_name="jit(f)/layer/add" stack_frame_id=1}}
}}
"""  # noqa: E501


def program(text):
    return text.replace("%fused {", "%fused (a: f32[100]) -> f32[] {").replace(
        "ENTRY %main {", "ENTRY %main (a: f32[100]) -> f32[] {"
    )


@pytest.mark.parametrize(
    ("shape", "body", "moved"),
    [
        ("f32[100]{0}", "ROOT %r = f32[100]{0} negate(%big)", 400 + 400),
        (
            "f32[5]{0}",
            "ROOT %r = f32[5]{0} dynamic-slice(%big, %start), dynamic_slice_sizes={5}",
            20 + 4 + 20,
        ),
        ("f32[]", "ROOT %r = f32[] reduce(%big, %start), dimensions={0}, to_apply=%add", 404 + 4),
        (
            "f32[100]{0}",
            "%cut = f32[5]{0} slice(%big), slice={[0:5]}\n"
            "  ROOT %r = f32[100]{0} dynamic-update-slice(%big, %cut, %start)",
            20 + 4 + 20,  # in place: what is not updated is not touched
        ),
        (
            "(f32[100]{0}, f32[100]{0})",
            "%n = f32[100]{0} negate(%big)\n  %e = f32[100]{0} exponential(%big)\n"
            "  ROOT %r = (f32[100]{0}, f32[100]{0}) tuple(%n, %e)",
            400 + 800,  # two results, one read
        ),
    ],
)
def test_bytes_of_a_fusion(shape, body, moved):
    found = roofline_of(program(FUSED.format(shape=shape, body=body)), SIMPLE)
    (kernel,) = found.kernels
    assert kernel.bytes == moved
    assert kernel.bound == "bytes"
    assert found.seconds == moved / 10
    assert kernel.layer == "layer"


def test_a_product_within_a_fusion_reads_all_of_both_operands():
    """Few results are made of many elements: a dense head, a kernel's gradient."""
    text = """%fused (a: f32[100,50], b: f32[50]) -> f32[2] {
  %a = f32[2,50]{1,0} parameter(0)
  %b = f32[50]{0} parameter(1)
  %small = f32[2]{0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r = f32[2]{0} negate(%small)
}
ENTRY %main (x: f32[2,50], y: f32[50]) -> f32[2] {
  %x = f32[2,50]{1,0} parameter(0)
  %y = f32[50]{0} parameter(1)
  ROOT %f = f32[2]{0} fusion(%x, %y), kind=kCustom, calls=%fused
}
"""
    assert sum(kernel.bytes for kernel in roofline_of(text, SIMPLE).kernels) == 400 + 200 + 8


@pytest.mark.parametrize(
    ("target", "scratch", "moved"),
    [
        ("__cublas$gemm", "s8[1000]{0}", 96),
        ("__cublas$lt$matmul", "u8[1000]{0}", 96),
        ("__cublas$gemm", "f32[2]{0}", 104),
        ("a_kernel", "s8[1000]{0}", 1096),
    ],
)
def test_a_librarys_space_to_work_in_is_not_moved(target, scratch, moved):
    text = f"""ENTRY %main (x: f32[8,1], y: f32[1,1]) -> f32[8,1] {{
  %x = f32[8,1]{{1,0}} parameter(0)
  %y = f32[8,1]{{1,0}} parameter(1)
  %c = (f32[8,1]{{1,0}}, {scratch}) custom-call(%x, %y), custom_call_target="{target}"
  ROOT %r = f32[8,1]{{1,0}} get-tuple-element(%c), index=0
}}
"""
    (kernel,) = roofline_of(text, SIMPLE).kernels
    assert kernel.bytes == moved


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("f8e4m3b11fnuz", 1), ("f8e3m4", 1), ("s4", 1), ("bf16", 2), ("c64", 8), ("pred", 1)],
)
def test_bytes_of_types(dtype, size):
    text = f"ENTRY %main {{\n  ROOT %x = {dtype}[10]{{0}} parameter(0)\n}}\n"
    assert parse(program(text)).computations["main"]["x"].bytes == 10 * size


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("f32[5]{0} all-reduce(%x), to_apply=%add", "all-reduce", 2 * 20),
        ("f32[40]{0} all-gather(%x), dimensions={0}", "all-gather", 160),
        (
            "(f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%x), "
            "source_target_pairs={{0,1}}",
            "collective-permute",
            20,
        ),
    ],
)
def test_exchanges_take_the_time_of_a_link(line, kind, sent):
    text = f"ENTRY %main {{\n  %x = f32[5]{{0}} parameter(0)\n  ROOT %exchange = {line}\n}}\n"
    rates = dataclasses.replace(SIMPLE, link_bytes_per_s=4.0)
    (kernel,) = roofline_of(program(text), rates).kernels
    assert (kernel.kind, kernel.bytes, kernel.seconds) == (kind, sent, sent / 4)
    (slower,) = roofline_of(program(text), SIMPLE).kernels
    assert slower.seconds == sent  # over the link to the host


LOOP = """
FileNames
1 "net.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=0 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%body (a: (f32[1])) -> (f32[1]) {
  %a = (f32[1]{0}) parameter(0)
  %g = f32[1]{0} get-tuple-element(%a), index=0
  %c = f32[1]{0} copy(%g), metadata={op_name="jit(f)/while" stack_frame_id=1}
  ROOT %t = (f32[1]{0}) tuple(%c)
}
%condition (a: (f32[1])) -> pred[] {
  %b = (f32[1]{0}) parameter(0)
  ROOT %p = pred[] constant(true)
}
%other (a: (f32[1])) -> (f32[1]) {
  ROOT %o = (f32[1]{0}) parameter(0)
}
ENTRY %main (x: f32[1]) -> (f32[1]) {
  %x = f32[1]{0} parameter(0)
  %q = pred[] constant(true)
  %t0 = (f32[1]{0}) tuple(%x)
  %w = (f32[1]{0}) while(%t0), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  ROOT %k = (f32[1]{0}) conditional(%q, %w, %w), true_computation=%body, false_computation=%other
}
"""  # noqa: E501


def test_loops_are_multiplied_out_and_of_branches_the_longest_counts():
    found = roofline_of(LOOP, SIMPLE)
    assert [(k.name, k.launches) for k in found.kernels] == [("c", 6), ("c", 1)]
    assert found.launches == 7
    assert found.conditionals == 1
    assert found.seconds == 7 * 0.8 + 7.0  # eight bytes each; the wait for the predicate
    assert found.by_source() == {"": 7.0, "net.py:12": pytest.approx(5.6)}
    assert found.by_bound() == {"conditionals": 7.0, "bytes": pytest.approx(5.6)}
    assert "7 launches" in repr(found)


def test_a_loop_of_unknown_length_is_refused():
    unknown = LOOP.replace('"known_trip_count":{"n":"6"}', "")
    with pytest.raises(ValueError, match=r"w: XLA does not know how often .* unknown_trip_count"):
        roofline_of(unknown, SIMPLE)
    assert roofline_of(unknown, SIMPLE, unknown_trip_count=6).launches == 7
    assert roofline_of(unknown, SIMPLE, unknown_trip_count=0).launches == 1


def test_a_copy_to_the_host_takes_the_links_time():
    text = LOOP.replace("%c = f32[1]{0} copy(%g)", "%c = f32[1]{0:S(5)} copy(%g)")
    found = roofline_of(text, SIMPLE)
    assert {k.kind for k in found.kernels} == {"host copy"}
    assert found.kernels[0].seconds == 6 * 4.0


# As XLA:GPU writes rows to a map in the host's memory, and reads some: fusions that run beside.
OFFLOADED = """
%put (a: f32[100], b: f32[5]) -> f32[100] {
  %map = f32[100]{0:S(5)} parameter(0)
  %rows = f32[5]{0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %r = f32[100]{0:S(5)} dynamic-update-slice(%map, %rows, %at)
}
%get (a: f32[100]) -> f32[7] {
  %map2 = f32[100]{0:S(5)} parameter(0)
  %at2 = s32[] parameter(1)
  ROOT %r2 = f32[7]{0} dynamic-slice(%map2, %at2), dynamic_slice_sizes={7}
}
ENTRY %main (a: f32[5]) -> f32[7] {
  %new = f32[5]{0} parameter(0)
  %i = s32[] parameter(1)
  %e = f32[100]{0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %p = ((f32[100]{0:S(5)}, f32[5]{0}, s32[]), f32[100]{0:S(5)}, u32[]) fusion-start(%e, %new, %i), kind=kLoop, calls=%put
  %pd = f32[100]{0:S(5)} fusion-done(%p)
  %g = ((f32[100]{0:S(5)}, s32[]), f32[7]{0}, u32[]) fusion-start(%pd, %i), kind=kLoop, calls=%get
  ROOT %gd = f32[7]{0} fusion-done(%g)
}
"""  # noqa: E501


def test_only_the_rows_that_are_put_or_read_cross_to_the_host():
    found = roofline_of(OFFLOADED, SIMPLE)
    assert [(k.name, k.kind, k.bytes) for k in found.kernels] == [
        ("p", "host copy", 20),
        ("g", "host copy", 28),
    ]


def test_bad_input():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("nothing")
    for target in ("cpu", "tpu-v5e"):
        with pytest.raises(ValueError, match=f"'{target}': programs for GPUs alone .*h200"):
            roofline.estimate(jnp.sin, jnp.ones(3), target=target)
    for count in (-4, 2.5, True):
        with pytest.raises(ValueError, match=r"unknown_trip_count: got .* at least 0"):
            roofline.estimate(jnp.sin, jnp.ones(3), unknown_trip_count=count)
        with pytest.raises(ValueError, match="unknown_trip_count: got"):
            roofline_of(LOOP, SIMPLE, unknown_trip_count=count)
    with pytest.raises(ValueError, match="Did you mean 'h200'"):
        roofline.estimate(jnp.sin, jnp.ones(3), target="h20")


class TestCompiled:
    pytestmark = COMPILES_FOR_H200

    def test_operations_of_convolutions_and_their_gradients(self):
        """Forward and both gradients take as many operations as each other."""

        def loss(kernels, image):
            for kernel in kernels:
                image = lax.conv_general_dilated(
                    image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            return jnp.mean(image.astype(jnp.float32) ** 2)

        kernels = [jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.bfloat16)] * 2
        image = jax.ShapeDtypeStruct((1, 256, 256, 64), jnp.bfloat16)
        found = roofline.estimate(jax.grad(loss), kernels, image, target="h200")
        one = 2 * 256 * 256 * 64 * 64 * 9
        assert found.operations == 5 * one  # no gradient of the image
        kinds = found.by_kind()
        assert {"convolution", "kernel gradient", "image gradient"} <= set(kinds)
        assert kinds["convolution"] == pytest.approx(2 * one / (0.48 * 989e12), rel=1e-6)

    def test_operations_of_a_product(self):
        a = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16)
        b = jax.ShapeDtypeStruct((1024, 256), jnp.bfloat16)
        found = roofline.estimate(lambda a, b: a @ b, a, b, target="h200")
        assert found.operations == 2 * 512 * 1024 * 256

    def test_products_move_their_operands(self):
        def product(a, b):
            return a.T @ b

        a, b = (jax.ShapeDtypeStruct((1 << 20, 64), jnp.bfloat16) for _ in range(2))
        tall = roofline.estimate(product, a, b, target="h200")
        assert 1 <= tall.bytes / (2 * 2 * 64 * 2**20) < 1.1
        small = jax.ShapeDtypeStruct((64, 64), jnp.complex64)
        found = roofline.estimate(product, small, small, target="h200")
        assert found.bytes == 3 * 64 * 64 * 8
        assert found.operations == 8 * 64**3

    def test_maps_that_wait_on_the_host_cross_there_and_back(self):
        def loss(kernels, image):
            for i, kernel in enumerate(kernels):
                image = lax.conv_general_dilated(
                    image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                image = checkpoint_name(jnp.tanh(image), f"map{i}")
            return jnp.mean(image.astype(jnp.float32) ** 2)

        by_rows = lrjax.rowwise(
            loss, in_axes=(None, 1), strategy="column", cuts=("map0",), offload=True
        )
        kernels = [jax.ShapeDtypeStruct((3, 3, c, 16), jnp.bfloat16) for c in (3, 16)]
        image = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.bfloat16)
        found = roofline.estimate(jax.grad(by_rows), kernels, image, target="h200")
        one = 256 * 256 * 16 * 2
        crossing = sum(k.bytes * k.launches for k in found.kernels if k.kind == "host copy")
        assert crossing == pytest.approx(4 * one, rel=1e-3)  # the map and its gradient, out and in
        assert not {"fusion-start", "AllocateBuffer"} & set(found.by_kind())
