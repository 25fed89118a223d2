"""The networks by name, for `lrjax train`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from lrjax.models.convnext import ConvNeXtT
from lrjax.models.densenet import DenseNet121
from lrjax.models.efficientnet import EfficientNetB0
from lrjax.models.mobilenet import MobileNetV2
from lrjax.models.resnet import ResNet18, ResNet34, ResNet50, ResNet101
from lrjax.models.unet import UNet
from lrjax.models.vgg import VGG16


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that can be asked for by name.

    Attributes:
      make: takes `num_classes`, `width`, `dtype` and the settings.
      settings: what else may be chosen, with the values allowed.
      defaults: of settings and of what cannot be chosen, where they differ from `make`'s.
      labels_pixels: gives a class for every pixel, not one for the image.
    """

    make: Callable[..., nn.Module]
    settings: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels_pixels: bool = False


_NORM = {"norm": ("batch", "block", "frozen", "group", "none")}

NETWORKS = {
    # Without normalisation layers VGG-16 is ill-conditioned: from random logits its first steps
    # overshoot, and rounding is amplified a thousandfold. From equal logits training is smooth.
    "vgg16": Network(
        VGG16,
        {"head": ("gap", "dense")},
        {"head": "gap", "classifier_init": nn.initializers.zeros},
    ),
    "resnet18": Network(ResNet18, _NORM),
    "resnet34": Network(ResNet34, _NORM),
    "resnet50": Network(ResNet50, _NORM),
    "resnet101": Network(ResNet101, _NORM),
    "convnext_tiny": Network(ConvNeXtT),
    "mobilenet_v2": Network(MobileNetV2, _NORM),
    "efficientnet_b0": Network(EfficientNetB0, _NORM),
    "densenet121": Network(DenseNet121, _NORM),
    "unet": Network(UNet, {**_NORM, "upsampling": ("transpose", "nearest")}, labels_pixels=True),
}


def network(name: str) -> Network:
    """The network of that name.

    Raises:
      ValueError: where there is none.
    """
    if name not in NETWORKS:
        raise ValueError(f"model: got {name!r}; use {', '.join(NETWORKS)}")
    return NETWORKS[name]


def build(name: str, *, num_classes: int, width: float, dtype: Any, **settings: Any) -> nn.Module:
    """Builds a network.

    Args:
      name: one of `NETWORKS`.
      num_classes: logits per image, or per pixel.
      width: multiplier of its channel counts.
      dtype: of the computation.
      **settings: the network's own; None chooses its default.

    Raises:
      ValueError: for a name, setting or value that does not exist.

    Example:
      >>> build("resnet50", num_classes=10, width=1.0, dtype=jnp.bfloat16, norm="group")
    """
    found = network(name)
    chosen = {key: value for key, value in settings.items() if value is not None}
    for key, value in chosen.items():
        if key not in found.settings:
            raise ValueError(f"{key}: got {value!r}; {name} has no such choice, leave it out")
        if value not in found.settings[key]:
            allowed = " or ".join(found.settings[key])
            raise ValueError(f"{key}: got {value!r}; use {allowed}")
    return found.make(
        num_classes=num_classes, width=width, dtype=dtype, **{**found.defaults, **chosen}
    )
