"""What became of each layer of a converted network."""

from collections.abc import Sequence
from dataclasses import dataclass

from pcnn_lightning.tables import filled, text_table


@dataclass(frozen=True)
class ConvertedLayer:
    """A convolution or linear layer of the network.

    Attributes:
        name: its path in the network.
        kind: its type before conversion, such as ``Conv2d 3×3``.
        reason: why it stayed real; None if it became 1-bit.
        weights: its number of weights, without biases.
        macs: its multiply-accumulates for one image.
        is_convolution: whether it is a convolution, and not a linear layer.
    """

    name: str
    kind: str
    reason: str | None
    weights: int
    macs: int
    is_convolution: bool = True

    @property
    def is_converted(self) -> bool:
        """Whether it became 1-bit."""
        return self.reason is None


@dataclass(frozen=True)
class ConversionReport:
    """The layers of a network in the order in which an image passes through them."""

    layers: Sequence[ConvertedLayer]

    @property
    def converted(self) -> list[ConvertedLayer]:
        """The layers that became 1-bit."""
        return [layer for layer in self.layers if layer.is_converted]

    @property
    def share_of_weights(self) -> float:
        """The share of all weights of convolutions and linear layers that became 1-bit."""
        return _share(sum(layer.weights for layer in self.converted), sum(layer.weights for layer in self.layers))

    @property
    def share_of_convolution_weights(self) -> float:
        """The share of the weights of convolutions that became 1-bit."""
        convolutions = [layer for layer in self.layers if layer.is_convolution]
        return _share(sum(layer.weights for layer in self.converted), sum(layer.weights for layer in convolutions))

    @property
    def share_of_macs(self) -> float:
        """The share of multiply-accumulates with 1-bit weights."""
        return _share(sum(layer.macs for layer in self.converted), sum(layer.macs for layer in self.layers))

    def table(self) -> str:
        """Format as a table with a row per layer, and the totals."""
        weights, macs = (sum(getattr(layer, name) for layer in self.layers) for name in ("weights", "macs"))
        rows = [["layer", "kind", "weights\n%", "MACs\n%", "became"]]
        for layer in self.layers:
            shares = (f"{100 * _share(*pair):.1f}" for pair in ((layer.weights, weights), (layer.macs, macs)))
            rows.append([layer.name, layer.kind, *shares, "1-bit" if layer.is_converted else f"real: {layer.reason}"])
        return f"{text_table(rows)}\n\n{filled(self.total())}"

    def total(self) -> str:
        """Format the totals as a sentence."""
        return (
            f"{len(self.converted)} of {len(self.layers)} layers became 1-bit: {self.share_of_weights:.1%} of the "
            f"weights and {self.share_of_macs:.1%} of the multiply-accumulates."
        )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
