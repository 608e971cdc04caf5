"""Short names for the study's backbones."""

from collections.abc import Mapping

from featprobe.specs import BackboneSpec

ALIASES: Mapping[str, BackboneSpec] = {
    spec.label: spec
    for spec in (
        BackboneSpec("convnext_dinov3", "convnext_tiny.dinov3_lvd1689m"),
        BackboneSpec("convnext_in1k", "convnext_tiny.fb_in1k"),
        BackboneSpec("convnext_in22k", "convnext_tiny.fb_in22k"),
        BackboneSpec("resnet50", "resnet50.a1_in1k"),
        BackboneSpec("embedded", "tf_efficientnet_lite0.in1k", "embedded"),
    )
}
