"""Efficient detection transformers on Detectron2: one shared detector, many small parts."""

import importlib.util

__version__ = "0.1.0"

_HOW_TO_INSTALL_DETECTRON2 = """\
efficient_detr needs Detectron2, which no package registry has. Install one of these two:
  real: pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2
  lite: pip install ./detectron2_lite   (the subset that comes with efficient_detr)"""

_spec = importlib.util.find_spec("detectron2")
# A mere folder of that name, such as a clone of its repository, has no origin.
if _spec is None or _spec.origin is None:
    raise ImportError(_HOW_TO_INSTALL_DETECTRON2, name="detectron2")


def detectron2_description() -> str:
    """Says which Detectron2 is in use, for log headers and reports.

    Returns:
        "detectron2: lite" for the subset that comes with this project, else "detectron2: real"
        followed by the version.
    """
    import detectron2

    if getattr(detectron2, "__lite__", False):
        return "detectron2: lite"
    return f"detectron2: real {detectron2.__version__}"
