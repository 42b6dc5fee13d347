"""Policies for groups of parameters, named so that a config which uses them can be saved."""

BACKBONE_LR_FACTOR = 0.1


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
