"""The equations of PCNN and MCN as pure tensor functions that depend on torch alone.

Numbers in parentheses are those of chapter 3 of *Binary Neural Networks: Algorithms, Architectures, and Applications*
(Zhang, Xu, Lin, Wang and Doermann, CRC Press, 2023, https://doi.org/10.1201/9781003376132).
"""

from pcnn_lightning.functional.binary import binarize as binarize
from pcnn_lightning.functional.modulation import kmeans_1d as kmeans_1d
from pcnn_lightning.functional.modulation import modulate as modulate
from pcnn_lightning.functional.modulation import nearest as nearest
from pcnn_lightning.functional.normalization import Normalization as Normalization
from pcnn_lightning.functional.normalization import normalize_filters as normalize_filters
from pcnn_lightning.functional.projection import ProjectionForward as ProjectionForward
from pcnn_lightning.functional.projection import eta_square as eta_square
from pcnn_lightning.functional.projection import project as project
from pcnn_lightning.functional.signs import SignGradient as SignGradient
from pcnn_lightning.functional.signs import sign as sign
from pcnn_lightning.functional.signs import sign_activation as sign_activation
from pcnn_lightning.functional.signs import straight_through as straight_through
