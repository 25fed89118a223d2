"""Whether an installed lrjax works, seen from outside: run by scripts/smoke_wheel.sh, or by hand.

python scripts/smoke.py library    # needs nothing but lrjax
python scripts/smoke.py command    # needs the `experiments` extra
"""

import importlib.metadata
import importlib.resources
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

import lrjax

COMMAND = Path(sys.executable).with_name("lrjax")


def loss_fn(kernels: list[jax.Array], images: jax.Array) -> jax.Array:
    for kernel in kernels:
        layout = ("NHWC", "HWIO", "NHWC")
        images = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=layout
        )
        images = jax.nn.relu(images)
    return jnp.mean(images**2)


def library() -> None:
    """What a user has after `pip install lrjax`."""
    assert lrjax.__version__ == importlib.metadata.version("lrjax")
    installed = importlib.resources.files("lrjax")
    assert "site-packages" in str(installed), f"{installed} is no installation"
    for name in ("py.typed", "memory/viewer/viewer.html", "memory/viewer/time.js"):
        assert (installed / name).is_file(), f"the distribution lacks {name}"
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = [jax.random.normal(keys[0], (3, 3, 3, 8)), jax.random.normal(keys[1], (3, 3, 8, 8))]
    images = jax.random.normal(keys[2], (1, 64, 32, 3))
    lrjax.testing.assert_same_as_column(loss_fn, (kernels, images), (None, 1), num_blocks=8)
    print(lrjax.explain(loss_fn, kernels, images, in_axes=(None, 1), num_blocks=8))
    profile = lrjax.memory.profile(jax.grad(loss_fn), kernels, images)
    with tempfile.TemporaryDirectory() as folder:
        profile.save_html(Path(folder) / "page.html")
    plan = lrjax.plan(loss_fn, kernels, images, in_axes=(None, 1), budget="1GiB")
    assert plan.choices
    assert lrjax.models.VGG16
    assert lrjax.linen.rowwise
    assert lrjax.nnx.rowwise


def command() -> None:
    """What the command does with what it needs."""
    subprocess.run([COMMAND, "doctor"], check=True)
    arguments = ["memory", "--model", "vgg16", "--image", "64", "--width", "0.0625"]
    subprocess.run([COMMAND, *arguments, "--target", "cpu"], check=True)


def command_without_its_extra() -> None:
    """The command tells what to install."""
    found = subprocess.run([COMMAND, "doctor"], capture_output=True, text=True)
    assert found.returncode != 0
    assert "lrjax[experiments]" in found.stderr, found.stderr
    assert "Traceback" not in found.stderr, found.stderr


if __name__ == "__main__":
    if sys.argv[1:] == ["library"]:
        library()
        command_without_its_extra()
    elif sys.argv[1:] == ["command"]:
        command()
    else:
        sys.exit(__doc__)
