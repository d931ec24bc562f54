"""What timm knows of its models: how they were trained, where their weights lie, how they are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fgvc_ext.data.transforms import IMAGENET_MEAN, IMAGENET_STD

# What lets a family take images of any size, the first that its constructor knows: vision transformers interpolate
# their positions and fill up the last patches, Swin transformers insist on one size unless they are told otherwise.
ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"dynamic_img_size": True},
    {"strict_img_size": False},
)


def timm_preprocessing(name: str) -> dict[str, Any]:
    """Mean, std and interpolation of a timm model's pretrained weights."""
    config = _library(name).get_pretrained_cfg(name)
    bicubic = config is not None and config.interpolation == "bicubic"
    return {
        "mean": tuple(IMAGENET_MEAN if config is None else config.mean),
        "std": tuple(IMAGENET_STD if config is None else config.std),
        "interpolation": "bicubic" if bicubic else "bilinear",
    }


def timm_weights(name: str) -> tuple[str, str] | None:
    """Name and address of the file of a timm model's pretrained weights; None for a model without any."""
    config = _library(name).get_pretrained_cfg(name)
    if config is not None and config.hf_hub_id:
        file = config.hf_hub_filename or "model.safetensors"
        url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file}"
        return f"{config.hf_hub_id.replace('/', '-')}{Path(file).suffix}", url
    return (config.url.rpartition("/")[2], config.url) if config is not None and config.url else None


def _library(name: str) -> Any:
    try:
        import timm
    except ImportError:
        raise ValueError(f"backbone: timm/{name} needs timm, which is not installed: pip install timm") from None
    if not timm.is_model(name):
        raise ValueError(f"backbone: timm {timm.__version__} has no model {name!r}")
    return timm


def create(name: str, image_size: int | None) -> tuple[Any, bool]:
    """A model without its classifier, and whether it is one of those that take any size when they are asked to.

    Raises:
        ValueError: no timm, no such model, or an image size for a model that is built for none.
    """
    timm = _library(name)
    fixed = {} if image_size is None else {"img_size": image_size}
    for options in ANY_SIZE:
        try:
            model = timm.create_model(name, num_classes=0, **options, **fixed)
        except TypeError as error:  # "unexpected keyword argument", before anything is built
            if not any(option in str(error) for option in options):
                break
        else:
            if hasattr(getattr(model, "patch_embed", None), "dynamic_img_pad"):
                model.patch_embed.dynamic_img_pad = True  # Swin's constructor does not pass it on
            return model, True
    try:
        return timm.create_model(name, num_classes=0, **fixed), False
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise ValueError(
            f"backbone: timm/{name} is not built for one image size: leave out image_size, got {image_size}"
        ) from None
