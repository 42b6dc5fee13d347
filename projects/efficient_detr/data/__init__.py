"""Data sets and their preparation.

Importing this package registers the quickstart data set (`quickstart_digits_train` and
`quickstart_digits_val`) with Detectron2, the way Detectron2 registers its own; nothing is
generated before it is read.
"""

from __future__ import annotations

from efficient_detr.data.digits import DigitsSettings, generate_digits, register_digits

__all__ = ["DigitsSettings", "generate_digits", "register_digits"]

register_digits()
