from torch import Tensor, nn

from .. import ops


class PartComposition(nn.Module):
    """One image for each box, in which the rest is noisy or blurred. See :func:`fgvc_ext.ops.compose_parts`.

    No parameters. The same in training and in evaluation.
    """

    def __init__(
        self,
        blur_sigma: float = 20.0,
        noise_std: float = 1.0,
        noise_mode: str = "add",
        part_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.blur_sigma, self.noise_std, self.noise_mode, self.part_size = blur_sigma, noise_std, noise_mode, part_size

    def forward(self, images: Tensor, boxes: Tensor, seed: int | Tensor | None = None) -> Tensor:
        """images [N,3,H,W] and boxes [N,M,4] → [N,M,3,h,w]; ``seed`` as in the operator."""
        return ops.compose_parts(
            images,
            boxes,
            blur_sigma=self.blur_sigma,
            noise_std=self.noise_std,
            noise_mode=self.noise_mode,
            part_size=self.part_size,
            seed=seed,
        )

    def extra_repr(self) -> str:
        return (
            f"blur_sigma={self.blur_sigma}, noise_std={self.noise_std}, noise_mode={self.noise_mode!r}, "
            f"part_size={self.part_size}"
        )
