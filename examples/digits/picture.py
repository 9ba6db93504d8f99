"""Grey pictures of 8×8 pixels in rows and columns, as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

CELL, GAP, TOP, LEFT = 4, 8, 34, 118
DARKEST = 16.0
"""The value of a black pixel in scikit-learn's digits"""


def sheet(title: str, rows: Sequence[tuple[str, np.ndarray]]) -> str:
    """Return rows of pictures, each a label and pictures (N, 8, 8) with values from 0 to 16, as an SVG picture."""
    side = rows[0][1].shape[1] * CELL
    across = max(len(images) for _, images in rows)
    width, height = LEFT + across * (side + GAP) + GAP, TOP + len(rows) * (side + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="system-ui, sans-serif" shape-rendering="crispEdges" role="img">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{GAP}" y="22" font-size="14" fill="#1f2328">{escape(title)}</text>',
    ]
    for place, (label, images) in enumerate(rows):
        top = TOP + place * (side + GAP)
        parts.append(f'<text x="{GAP}" y="{top + side / 2 + 4:g}" font-size="12" fill="#1f2328">{escape(label)}</text>')
        for column, image in enumerate(images):
            left = LEFT + column * (side + GAP)
            parts.append(f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="#f2f4f6"/>')
            parts += [_pixel(left + x * CELL, top + y * CELL, value) for (y, x), value in np.ndenumerate(image) if value >= 0.5]
    return "\n".join([*parts, "</svg>", ""])


def _pixel(x: int, y: int, value: float) -> str:
    level = 242 - round(212 * min(value / DARKEST, 1.0))
    return f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="#{level:02x}{level:02x}{level:02x}"/>'
