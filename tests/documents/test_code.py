"""All code of the documents runs: Python as it stands, commands as far as their options go."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer.main
from jax import lax
from PIL import Image

import lrjax
from lrjax.app.cli import app
from marks import COMPILES_FOR_H200

ROOT = Path(__file__).resolve().parents[2]
PAGES = {str(p.relative_to(ROOT)): p for p in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Pages whose code has a test of its own, which tries what it defines.
TESTED_ELSEWHERE = {
    "README.md": "tests/test_documents.py",
    "docs/add-a-rule.md": "tests/rules/test_add_a_rule.py",
    "docs/add-a-strategy.md": "tests/strategies/test_strategy_objects.py",
}
NEEDS_A_GPUS_COMPILER = {
    "docs/how-to/absent-device.md",
    "docs/how-to/read-a-roofline.md",
    "docs/memory-viewer.md",
    "docs/memory.md",
    "docs/planner.md",
    "docs/roofline.md",
}
# Those that take more than five seconds.
SLOW = {
    "docs/how-to/absent-device.md",
    "docs/how-to/budget.md",
    "docs/how-to/linen.md",
    "docs/how-to/other-libraries.md",
    "docs/how-to/read-a-roofline.md",
    "docs/models.md",
    "docs/planner.md",
    "docs/training.md",
    "docs/tutorial.md",
}


def blocks(page, *languages):
    return [code for language, code in BLOCK.findall(page.read_text()) if language in languages]


def a_loss():
    """What pages about a loss of the reader's own take for granted."""

    def loss(params, images):
        layout = ("NHWC", "HWIO", "NHWC")
        maps = lax.conv_general_dilated(
            images, params.astype(images.dtype), (1, 1), "SAME", dimension_numbers=layout
        )
        return jnp.mean(jax.nn.relu(maps) ** 2)

    return {
        "jax": jax,
        "jnp": jnp,
        "lrjax": lrjax,
        "loss": loss,
        "params": jnp.ones((3, 3, 3, 4)),
        "images": jnp.ones((1, 128, 16, 3)),
    }


def profiles():
    given = a_loss()
    profile = lrjax.memory.profile(given["loss"], given["params"], given["images"], target="cpu")
    return given | {"column": profile, "stream": profile}


def modules():
    import flax.linen as nn
    from flax import nnx

    class Block(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(nn.Conv(self.features, (3, 3))(x))

    images = jax.random.normal(jax.random.key(0), (1, 64, 32, 3))
    return {"Block": Block, "key": jax.random.key(1), "images": images, "nnx": nnx}


def a_folder_of_images():
    for name in ("ant", "bee"):
        Path("IMAGES", name).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(f"IMAGES/{name}/{i}.png")
    return {}


GIVEN = {
    "docs/memory-viewer.md": profiles,
    "docs/memory.md": a_loss,
    "docs/meshes.md": a_loss,
    "docs/models.md": modules,
    "docs/planner.md": a_loss,
    "docs/roofline.md": a_loss,
    "docs/training.md": a_folder_of_images,
}
# What is larger in a document than a test can run, and what stands for it.
SMALLER = {
    "docs/meshes.md": [("((8,)", "((1,)"), ("((2, 4)", "((1, 1)")],
    "docs/models.md": [
        ("run = lrjax.nnx", "model = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))\nrun = lrjax.nnx")
    ],
    "docs/training.md": [("(2048, 2048)", "(64, 64)"), ('"stream", 64', '"stream", 4'),
                         ("VGG16(", "VGG16(width=0.03125, "), ("steps=100", "steps=2")],
}  # fmt: skip


def marked(name):
    marks = [pytest.mark.slow] if name in SLOW else []
    marks += COMPILES_FOR_H200 if name in NEEDS_A_GPUS_COMPILER else []
    return pytest.param(name, marks=marks)


WITH_CODE = [n for n, page in PAGES.items() if blocks(page, "python") and n not in TESTED_ELSEWHERE]


@pytest.mark.parametrize("name", [marked(name) for name in sorted(WITH_CODE)])
def test_python_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    namespace = {"__name__": "a_page", **GIVEN.get(name, dict)()}
    code = "\n\n".join(blocks(PAGES[name], "python"))
    for written, tried in SMALLER.get(name, []):
        assert written in code, f"{name} no longer says {written}: mend SMALLER here"
        code = code.replace(written, tried)
    exec(compile(code, name, "exec"), namespace)


def test_pages_that_are_named_here_exist():
    assert {*TESTED_ELSEWHERE, *SLOW, *GIVEN, *SMALLER} <= set(PAGES)
    for name, test in TESTED_ELSEWHERE.items():
        assert Path(name).name in (ROOT / test).read_text()


def command_lines():
    for name, page in PAGES.items():
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield pytest.param(words, id=f"{name}: {line.strip()[:60]}")


@pytest.mark.parametrize("words", list(command_lines()))
def test_commands_exist(words):
    program, *rest = words
    if program == "lrjax":
        command = typer.main.get_command(app).commands[rest[0]]
        arguments = [word for word in rest[1:] if word != "--help"]
        command.make_context(rest[0], arguments)  # complains of options that there are not
    elif program in ("bash", "python") and rest[0] == "-m":
        own = rest[1].startswith(("experiments", "scripts", "lrjax"))
        assert not own or (ROOT / (rest[1].replace(".", "/") + ".py")).is_file(), rest[1]
    elif program in ("bash", "python"):
        assert (ROOT / rest[0]).is_file(), rest[0]
