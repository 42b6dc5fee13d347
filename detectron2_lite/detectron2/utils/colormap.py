"""Colours that are easy to tell apart on photographs."""

from itertools import product

import numpy as np


def _palette() -> np.ndarray:
    """74 RGB colours in [0, 1]: hand-picked ones, a lattice, ramps of the primaries, greys."""
    thousandths = "000447741 850325098 929694125 494184556 466674188 301745933 635078184"
    codes = [*thousandths.split(), "300300300", "600600600"]
    picked = [[int(code[start : start + 3]) / 1000 for start in (0, 3, 6)] for code in codes]
    primary = [(1, 0, 0), (1, 0.5, 0), (0.749, 0.749, 0), (0, 1, 0), (0, 0, 1), (0.667, 0, 1)]
    levels = (0, 0.333, 0.667, 1)
    pairs = list(product(levels, repeat=2))
    lattice = [(*pair, 0.0) for pair in pairs if min(pair) > 0]
    lattice += [(*pair, blue) for blue in (0.5, 1.0) for pair in pairs[1:]]
    lattice.pop()  # white comes last
    ramp = (0.167, 0.333, 0.5, 0.667, 0.833, 1)
    ramps = [np.eye(3)[channel] * level for channel in range(3) for level in ramp][1:]
    greys = [(level,) * 3 for level in (0, 0.143, 0.857, 1)]
    return np.array([*picked, *primary, *lattice, *ramps, *greys], dtype=np.float32)


_COLORS = _palette()


def colormap(rgb: bool = False, maximum: int = 255) -> np.ndarray:
    """All colours, float32 (74, 3), in 0 ... ``maximum`` (255 or 1); BGR unless ``rgb``."""
    assert maximum in (255, 1), maximum
    return _COLORS * maximum if rgb else _COLORS[:, ::-1] * maximum


def random_color(rgb: bool = False, maximum: int = 255) -> np.ndarray:
    """One of the colours (3,), by one integer of NumPy's global generator."""
    return colormap(rgb, maximum)[np.random.randint(0, len(_COLORS))]
