"""Roofline: operations and bytes of kernels on hand-made programs, and of compiled ones."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lrjax import roofline
from lrjax.roofline import Rates, rates_of, roofline_of
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


def test_a_copy_to_the_host_takes_the_links_time():
    text = LOOP.replace("%c = f32[1]{0} copy(%g)", "%c = f32[1]{0:S(5)} copy(%g)")
    found = roofline_of(text, SIMPLE)
    assert {k.kind for k in found.kernels} == {"host copy"}
    assert found.kernels[0].seconds == 6 * 4.0


def test_bad_input():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("nothing")
    for target in ("cpu", "tpu-v5e"):
        with pytest.raises(ValueError, match=f"'{target}': no rates .*h200"):
            rates_of(target)
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
