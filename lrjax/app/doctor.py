"""What ``lrjax doctor`` looks at: packages, extras, and gradients on the device at hand."""

from __future__ import annotations

import dataclasses
import glob
import importlib.metadata
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from packaging.requirements import InvalidRequirement, Requirement

import lrjax
from lrjax import strategies, testing

PACKAGES = ("lrjax", "jax", "jaxlib", "flax", "optax", "chex", "numpy")
EXTRAS = ("experiments", "pictures", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that lrjax needs.

    Attributes:
      name: on the package index.
      version: that is installed; ``""``: it is not.
      wanted: the versions that lrjax asks for, e.g. ``">=0.10"``; ``""``: any.
      suits: whether what is installed is wanted.
    """

    name: str
    version: str
    wanted: str
    suits: bool


@dataclasses.dataclass(frozen=True)
class Extra:
    """An optional set of packages, with those that are missing or too old."""

    name: str
    missing: tuple[str, ...]

    @property
    def install(self) -> str:
        return f'pip install "lrjax[{self.name}]"'


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """One way to run the network of the self-test.

    Attributes:
      name: of the strategy, with cuts or parts of the batch.
      seconds: that compiling and comparing took.
      error: what differs from column, or why it did not run; ``""``: it is the same.
    """

    name: str
    seconds: float
    error: str


def packages() -> list[Package]:
    """Python and what lrjax always needs, with the versions it asks for."""
    wanted = {r.name: r for r in _requirements("lrjax")}
    version = ".".join(map(str, sys.version_info[:3]))
    python = Package("python", version, _python_wanted(), True)
    if python.wanted:
        fits = Requirement(f"python{python.wanted}").specifier.contains(python.version)
        python = dataclasses.replace(python, suits=fits)
    return [python, *(_package(name, wanted.get(name)) for name in PACKAGES)]


def extras() -> list[Extra]:
    """The optional sets of packages, those for development left out."""
    found = []
    for extra in EXTRAS:
        needed = [_package(r.name, r) for r in _requirements("lrjax", extra)]
        missing = tuple(dict.fromkeys(f"{p.name}{p.wanted}" for p in needed if not p.suits))
        if needed:
            found.append(Extra(extra, missing))
    return found


def idle_accelerator() -> str:
    """What to do about an NVIDIA GPU that JAX does not use; ``""``: there is none such."""
    if not glob.glob("/dev/nvidia[0-9]*") or jax.default_backend() != "cpu":
        return ""
    chosen = jax.config.jax_platforms  # type: ignore[attr-defined]
    if chosen and "cpu" in chosen.split(","):
        return f"there is an NVIDIA GPU, and JAX_PLATFORMS={chosen} leaves it out"
    return 'there is an NVIDIA GPU that JAX does not use: pip install "lrjax[cuda]"'


def self_tests() -> Iterator[SelfTest]:
    """Outputs and gradients of a small network, by every strategy against column, on this device.

    The network has convolutions, a stride, a max pool, batch statistics and a dense layer. What is
    compared and how is ``lrjax.testing``'s.
    """
    args = _arguments()
    for name, (fun, options) in _ways().items():
        start, error = time.perf_counter(), ""
        try:
            testing.assert_same_as_column(fun, args, (None, 1), **options)
        except Exception as problem:  # a broken installation may raise anything
            error = f"{type(problem).__name__}: {problem}"
        yield SelfTest(name, time.perf_counter() - start, error)


def _ways() -> dict[str, tuple[Callable[..., jax.Array], dict[str, Any]]]:
    """A network and options of ``rowwise``, by what they are called in the table."""
    blocks = {"num_blocks": 4}
    ways: dict[str, tuple[Callable[..., jax.Array], dict[str, Any]]] = {
        strategy.name: (_network, {"strategy": strategy, **(blocks if strategy.by_rows else {})})
        for strategy in strategies.registered()
        if strategy != strategies.Column()
    }
    # Parts of a batch cannot have the statistics of all of it.
    in_parts = strategies.MicroBatches("stream", 2)
    ways["stream in 2 parts"] = _without_statistics, {"strategy": in_parts, **blocks}
    cut = {"cuts": ("pool",), **blocks}
    ways["stream, 2ps, cut"] = _network, {"strategy": ("stream", "2ps"), **cut}
    if jax.default_backend() in ("gpu", "tpu"):
        ways["stream, cut, offload"] = _network, {"offload": True, **cut}
    return ways


def _arguments() -> tuple[dict[str, jax.Array], jax.Array]:
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"first": (3, 3, 3, 8), "second": (3, 3, 8, 8), "third": (3, 3, 8, 8), "dense": (8, 5)}
    params = {
        name: jax.random.normal(key, shape) / 8
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    return params, jax.random.normal(keys[-1], (2, 48, 32, 3))


def _network(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    maps = _convolution(images, params["first"])
    axes = (0, 1, 2)
    maps = (maps - maps.mean(axes)) * jax.lax.rsqrt(maps.var(axes) + 1e-3)
    return _after_first(params, maps)


def _without_statistics(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    return _after_first(params, _convolution(images, params["first"]))


def _after_first(params: dict[str, jax.Array], maps: jax.Array) -> jax.Array:
    window = (1, 2, 2, 1)
    maps = jax.lax.reduce_window(maps, -jnp.inf, jax.lax.max, window, window, "VALID")
    maps = _convolution(checkpoint_name(maps, "pool"), params["second"], stride=2)
    return _convolution(maps, params["third"]).mean((1, 2)) @ params["dense"]


def _convolution(maps: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.nn.gelu(
        jax.lax.conv_general_dilated(maps, kernel, strides, "SAME", dimension_numbers=layout)
    )


def _requirements(package: str, extra: str = "") -> Iterator[Requirement]:
    """What a package's metadata asks for, always or with an extra; nothing where it has none.

    ``jax[cuda13]`` asks for jax, and for what jax's extra asks for.
    """
    try:
        listed = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for text in listed:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if _is_asked_for(requirement, extra):
            yield requirement
            for inner in sorted(requirement.extras):
                yield from _requirements(requirement.name, inner)


def _is_asked_for(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    if not extra:
        return marker is None or marker.evaluate({"extra": ""})
    return marker is not None and "extra" in str(marker) and marker.evaluate({"extra": extra})


def _python_wanted() -> str:
    try:
        metadata = importlib.metadata.metadata("lrjax")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return str(metadata.json.get("requires_python", ""))


def _package(name: str, requirement: Requirement | None) -> Package:
    wanted = str(requirement.specifier) if requirement else ""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "lrjax":  # run from its folder
            return Package(name, lrjax.__version__, wanted, suits=True)
        return Package(name, "", wanted, suits=False)
    suits = requirement is None or requirement.specifier.contains(version, prereleases=True)
    return Package(name, version, wanted, suits)
