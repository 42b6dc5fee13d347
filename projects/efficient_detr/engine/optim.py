"""Policies for groups of parameters, named so that a config which uses them can be saved."""

BACKBONE_LR_FACTOR = 0.1
SAMPLING_LR_FACTOR = 0.1

_SAMPLING_LAYERS = {"sampling_offsets", "reference_points"}


def backbone_lr_factor(parameter_name: str) -> float:
    """Learning-rate factor of a parameter: 0.1 in the backbone, 1 elsewhere.

    The backbone is pre-trained and the transformer is not (DETR, arXiv 2005.12872, appendix A.4:
    learning rates 1e-5 and 1e-4).

    Args:
        parameter_name: dotted name in the model.

    Returns:
        Factor of the base learning rate.
    """
    return BACKBONE_LR_FACTOR if "backbone" in parameter_name.split(".") else 1.0


def deformable_lr_factor(parameter_name: str) -> float:
    """Learning-rate factor of a parameter of Deformable DETR.

    Besides the backbone, the linear layers that say where to look learn ten times slower: sampling
    offsets and reference points (arXiv 2010.04159, section 5).

    Args:
        parameter_name: dotted name in the model.

    Returns:
        Factor of the base learning rate.
    """
    if _SAMPLING_LAYERS.isdisjoint(parameter_name.split(".")):
        return backbone_lr_factor(parameter_name)
    return SAMPLING_LR_FACTOR
