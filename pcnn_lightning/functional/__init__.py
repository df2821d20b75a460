"""The equations as pure tensor functions; only torch is imported here.

Numbers in parentheses are those of chapter 3 of *Binary Neural Networks: Algorithms, Architectures, and Applications*.
"""

from pcnn_lightning.functional.modulation import kmeans_1d, modulate, nearest
from pcnn_lightning.functional.projection import Levels, ProjectionForward, eta_square, project
from pcnn_lightning.functional.signs import SignGradient, sign, sign_activation

__all__ = [
    "Levels",
    "ProjectionForward",
    "SignGradient",
    "eta_square",
    "kmeans_1d",
    "modulate",
    "nearest",
    "project",
    "sign",
    "sign_activation",
]
