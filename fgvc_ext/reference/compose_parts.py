"""Part images of dual attention fusion (section 3.3): a region in its image, the others noisy, the rest blurred."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from .accumulation import accumulation_dtype
from .philox import draws

OPERATOR_ID = 2
POOL = 4  # the blur works on means of 4 × 4 pixels


def compose_parts(
    images: Tensor,
    boxes: Tensor,
    *,
    blur_sigma: float = 20.0,
    noise_std: float = 1.0,
    noise_mode: str = "add",
    part_size: int | tuple[int, int] | None = None,
    seed: Tensor,
) -> Tensor:
    samples, _, height, width = images.shape
    values = images.detach().to(accumulation_dtype(images.dtype))
    inside = _inside(boxes.detach().to(values.dtype), height, width)
    noise = noise_std * normals(seed, samples, height, width, values.dtype)
    noisy = values + noise if noise_mode == "add" else noise
    outside = torch.where(inside.any(dim=1)[:, None], noisy, blur(values, blur_sigma))
    parts = torch.where(inside[:, :, None], values[:, None], outside[:, None])  # the own box wins where boxes overlap
    if part_size is not None:
        part_height, part_width = (part_size, part_size) if isinstance(part_size, int) else part_size
        cells = parts.unflatten(4, (part_width, width // part_width))
        parts = cells.unflatten(3, (part_height, height // part_height)).mean(dim=(4, 6))
    return parts.to(images.dtype)


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """bool [N,M,H,W]: the pixels whose middle lies in a box [N,M,4]. None does where a side is NaN."""
    y = torch.arange(height, dtype=boxes.dtype, device=boxes.device) + 0.5
    x = torch.arange(width, dtype=boxes.dtype, device=boxes.device) + 0.5
    x1, y1, x2, y2 = (side[..., None] for side in boxes.unbind(2))
    rows, columns = (y1 <= y) & (y < y2), (x1 <= x) & (x < x2)
    return rows[..., None] & columns[:, :, None]


def normals(seed: Tensor, samples: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers [N,3,H,W], three of each pixel's four words: Box and Muller's method."""
    words = draws(seed, samples, 1, 4 * height * width, OPERATOR_ID).view(samples, height, width, 4)
    uniform = ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).to(dtype)
    radius, angle = (-2 * uniform[..., 0::2].log()).sqrt(), 2 * math.pi * uniform[..., 1::2]
    first, second = (radius * angle.cos()).unbind(3), (radius * angle.sin()).unbind(3)
    return torch.stack((first[0], second[0], first[1]), dim=1)


def blur(values: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of ``sigma`` pixels, at a quarter of the size, read bilinearly: [N,C,H,W] → [N,C,H,W]."""
    _, _, height, width = values.shape
    sigma = sigma / POOL
    if sigma == 0:
        return values
    small = functional.avg_pool2d(values, POOL, ceil_mode=True, count_include_pad=False)
    weights = gaussian(sigma)
    small = _blurred_rows(_blurred_rows(small, weights).transpose(2, 3), weights).transpose(2, 3)
    return _resized_rows(_resized_rows(small.transpose(2, 3), height).transpose(2, 3), width)


def gaussian(sigma: float) -> list[float]:
    """Weights of the offsets −r … r, r = ceil(3 · sigma), which add up to one."""
    radius = math.ceil(3 * sigma)
    places = [offset / sigma for offset in range(-radius, radius + 1)]
    weights = [math.exp(-0.5 * place * place) for place in places]
    total = sum(weights)
    return [weight / total for weight in weights]


def _blurred_rows(values: Tensor, weights: list[float]) -> Tensor:
    size, radius = values.shape[-1], len(weights) // 2
    places = torch.arange(-radius, size + radius, device=values.device)
    period = max(2 * (size - 1), 1)  # reflected at the first and the last value, as often as it takes
    places = places % period
    padded = values[..., torch.minimum(places, 2 * (size - 1) - places) if size > 1 else places * 0]
    total = weights[0] * padded[..., :size]
    for offset, weight in enumerate(weights[1:], start=1):
        total = total + weight * padded[..., offset : offset + size]
    return total


def _resized_rows(values: Tensor, count: int) -> Tensor:
    """Bilinear, with half-pixel centres; the place and the share of its upper neighbour are exact."""
    size = values.shape[-1]
    place = (2 * torch.arange(count, device=values.device) + 1) * size - count  # in units of 1 / (2 · count)
    lower = place.div(2 * count, rounding_mode="floor")
    share = (place - 2 * count * lower).to(values.dtype) / (2 * count)
    below, above = values[..., lower.clamp(0, size - 1)], values[..., (lower + 1).clamp(0, size - 1)]
    return (1 - share) * below + share * above
