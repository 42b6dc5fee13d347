"""Evaluation: FLOPs, parameters and kept tokens beside Detectron2's accuracy evaluators."""

from efficient_detr.evaluation.data_dependence import DataRecorder, DataStatistics
from efficient_detr.evaluation.flop_handlers import (
    FlopHandler,
    is_given,
    register_flop_handler,
    tensor_shape,
)
from efficient_detr.evaluation.flops import (
    FlopCount,
    ParameterCount,
    count_flops,
    count_parameters,
    stage_modules,
)
from efficient_detr.evaluation.flops_evaluator import (
    PADDED_HEADS,
    FlopsEvaluator,
    build_evaluators,
    describe_cost,
    describe_data,
    has_clusters,
)

__all__ = [
    "PADDED_HEADS",
    "DataRecorder",
    "DataStatistics",
    "FlopCount",
    "FlopHandler",
    "FlopsEvaluator",
    "ParameterCount",
    "build_evaluators",
    "count_flops",
    "count_parameters",
    "describe_cost",
    "describe_data",
    "has_clusters",
    "is_given",
    "register_flop_handler",
    "stage_modules",
    "tensor_shape",
]
