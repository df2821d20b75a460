"""Conversion of any network to a 1-bit network, by replacing its convolutions."""

from pcnn_lightning.conversion.convert import convert as convert
from pcnn_lightning.conversion.report import ConversionReport as ConversionReport
from pcnn_lightning.conversion.report import ConvertedLayer as ConvertedLayer
