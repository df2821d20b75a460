"""A 1-bit layer and a family that the package knows nothing about."""

from torch import Tensor

from pcnn_lightning import OneBitClassifier, QuantizedConv2d
from pcnn_lightning.families import register_family
from pcnn_lightning.functional import sign_activation


class ToyConv2d(QuantizedConv2d):
    """Convolves with signs times the largest magnitude of each filter."""

    def quantize(self) -> tuple[Tensor, None]:
        scale = self.weight.detach().abs().amax(dim=(1, 2, 3), keepdim=True)
        return sign_activation(self.weight, "polynomial") * scale, None


class Toy(OneBitClassifier):
    """A network of such layers on 1-bit activations."""

    family = "Toy"

    def __init__(self, *, backbone: str = "wrn7", **others):
        super().__init__(backbone=backbone, **others)
        self.build_network(ToyConv2d)


register_family("Toy", "toy_family.Toy", ToyConv2d)
