"""The order in which samples are visited, split over processes."""

from detectron2._absent import absent_name_getter

from .distributed_sampler import InferenceSampler, RepeatFactorTrainingSampler, TrainingSampler

__getattr__ = absent_name_getter(__name__)
