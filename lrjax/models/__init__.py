"""CNNs in Flax Linen to train row by row: ordinary modules, no lrjax code inside.

Rows are axis 1 (NHWC). Where a model can be cut into segments it tags the value with
`jax.ad_checkpoint.checkpoint_name`; the model's docstring lists the names.
"""

from lrjax.models.convnext import ConvNeXt, ConvNeXtT
from lrjax.models.densenet import DenseNet, DenseNet121
from lrjax.models.efficientnet import EfficientNet, EfficientNetB0
from lrjax.models.mobilenet import MobileNetV2
from lrjax.models.registry import NETWORKS, build
from lrjax.models.resnet import ResNet, ResNet18, ResNet34, ResNet50, ResNet101
from lrjax.models.unet import UNet
from lrjax.models.unet3d import UNet3D
from lrjax.models.vgg import VGG16, VGGFeatures

__all__ = [
    "NETWORKS",
    "VGG16",
    "ConvNeXt",
    "ConvNeXtT",
    "DenseNet",
    "DenseNet121",
    "EfficientNet",
    "EfficientNetB0",
    "MobileNetV2",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "ResNet101",
    "UNet",
    "UNet3D",
    "VGGFeatures",
    "build",
]
