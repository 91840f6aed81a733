"""A model of cost: what a graph does, and how long that takes on processors that are not at hand."""

from parvts_fx.cost.fusing import Operation
from parvts_fx.cost.operations import Tally, count, count_flops, flops_of
from parvts_fx.cost.predicting import Comparison, Prediction, compare, predict
from parvts_fx.cost.processors import CPU, GPUS, NAMES, Gpu, Processor, named

__all__ = [
    "CPU", "GPUS", "NAMES", "Comparison", "Gpu", "Operation", "Prediction", "Processor", "Tally", "compare", "count",
    "count_flops", "flops_of", "named", "predict",
]
