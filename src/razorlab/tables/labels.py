"""Labels that stand beside the points they name, and on nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.path import Path
from matplotlib.transforms import Bbox

DISTANCES = (9, 18, 28, 40, 54, 70, 88, 108)  # points of 1/72 inch from a marker's middle to its label
ANGLES = (0, 180, 35, -35, 145, -145, 90, -90, 65, -65, 115, -115)  # degrees; the first that fits
MARKER = 6  # points: half the side of the square that a marker takes
LEADER = 14  # points: a label farther away than this gets a line to its point


class Labelled(NamedTuple):
    """A point in data coordinates, its label, and half the length of its error bar."""

    x: float
    y: float
    text: str
    spread: float = 0.0
    color: str = "black"


Segment = tuple[tuple[float, float], tuple[float, float]]  # its two ends, in pixels


def label_points(
    axes: Axes,
    points: Sequence[Labelled],
    size: float = 8,
    taken: Sequence[Bbox] = (),
    line: Sequence[tuple[float, float]] = (),
) -> list[Bbox]:
    """Write each label as near to its point as it fits, on no marker, error bar, line or other label.

    Limits and layout of ``axes`` have to be final. Points at the edge of a crowd come first, so that the middle of the
    crowd does not take their places.

    Args:
        size: of the font, in points of 1/72 inch.
        taken: boxes in pixels where no label may stand, such as the legend's.
        line: corners, in data coordinates, of a line that no label may stand on.

    Returns:
        The boxes of the labels, in pixels, in the order of ``points``.
    """
    axes.figure.canvas.draw()
    pixels = axes.figure.dpi / 72
    frame = axes.get_window_extent()
    taken = [*taken, *(box for point in points for box in _own_boxes(axes, point, pixels))]
    middle = [sum(values) / len(points) for values in zip(*(_pixel(axes, p.x, p.y) for p in points), strict=True)]
    order = sorted(range(len(points)), key=lambda i: -math.dist(_pixel(axes, points[i].x, points[i].y), middle))
    corners = [_pixel(axes, *corner) for corner in line]
    lines: list[Segment] = list(itertools.pairwise(corners))
    boxes: dict[int, Bbox] = {}
    for index in order:
        point = points[index]
        text = axes.annotate(point.text, (point.x, point.y), (0, 0), textcoords="offset points", fontsize=size)
        text.set_in_layout(False)
        shape = text.get_window_extent()
        for dx, dy in _offsets(shape.width / pixels, shape.height / pixels):
            box = shape.translated(dx * pixels, dy * pixels)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            leader = _leader(axes, point, box, pixels)
            crossed = any(_cross(other, box) for other in lines) or (
                leader is not None and any(_cross(leader, other) for other in boxes.values())
            )
            if inside and not crossed and not any(box.overlaps(other) for other in taken):
                break
        text.set_position((dx, dy))
        taken.append(box)
        boxes[index] = box
        if leader:
            lines.append(leader)
            ends = axes.transData.inverted().transform(leader)
            axes.plot(*ends.T, color=point.color, linewidth=0.6, zorder=1, scalex=False, scaley=False)
    return [boxes[index] for index in range(len(points))]


def _offsets(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Where the lower left corner of a label may lie, in points from the marker's middle, nearest first."""
    for distance in DISTANCES:
        for angle in ANGLES:
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            # the label's own point that is nearest to the marker: a side, a corner, or the middle of an edge
            left = 0 if across > 0.3 else width if across < -0.3 else width / 2
            below = 0 if up > 0.6 else height if up < -0.6 else height / 2
            yield distance * across - left, distance * up - below


def marker_boxes(axes: Axes, points: Sequence[Labelled]) -> list[Bbox]:
    """What points without a label take, in pixels: for ``taken`` of ``label_points``. The layout has to be final."""
    axes.figure.canvas.draw()
    return [box for point in points for box in _own_boxes(axes, point, axes.figure.dpi / 72)]


def _own_boxes(axes: Axes, point: Labelled, pixels: float) -> list[Bbox]:
    """What a point takes: its marker, and its error bar."""
    x, y = _pixel(axes, point.x, point.y)
    side = MARKER * pixels
    boxes = [Bbox.from_extents(x - side, y - side, x + side, y + side)]
    if point.spread:
        low, high = (_pixel(axes, point.x, point.y + sign * point.spread)[1] for sign in (-1, 1))
        boxes.append(Bbox.from_extents(x - side / 2, low, x + side / 2, high))
    return boxes


def _leader(axes: Axes, point: Labelled, box: Bbox, pixels: float) -> Segment | None:
    """The line from a point to a label that does not stand right beside it."""
    x, y = _pixel(axes, point.x, point.y)
    near = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
    return ((x, y), near) if math.dist(near, (x, y)) > LEADER * pixels else None


def _cross(segment: Segment, box: Bbox) -> bool:
    return bool(Path(segment).intersects_bbox(box, filled=False))


def _pixel(axes: Axes, x: float, y: float) -> tuple[float, float]:
    return tuple(axes.transData.transform((x, y)))
