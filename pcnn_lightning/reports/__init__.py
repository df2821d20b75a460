"""Reports: the cost of a network, its speed, and comparisons of finished runs."""

from pcnn_lightning.reports.compare import compare as compare
from pcnn_lightning.reports.summary import NetworkSummary as NetworkSummary
from pcnn_lightning.reports.summary import summarize as summarize
