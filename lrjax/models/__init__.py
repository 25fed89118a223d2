"""CNNs in Flax Linen to train row by row: ordinary modules, no lrjax code inside.

Rows are axis 1 (NHWC). Where a model can be cut into segments it tags the value with
`jax.ad_checkpoint.checkpoint_name`; the model's docstring lists the names.
"""

from lrjax.models.vgg import VGG16, VGGFeatures

__all__ = ["VGG16", "VGGFeatures"]
