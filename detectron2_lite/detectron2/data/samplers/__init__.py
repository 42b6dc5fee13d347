"""The order in which samples are visited."""

from .distributed_sampler import InferenceSampler, RepeatFactorTrainingSampler, TrainingSampler
