"""Small multiples: a panel per optimiser, on common axes."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxsim.figures.labels import name
from jaxsim.figures.scales import hide_labels
from jaxsim.figures.style import COLUMN, PAGE, key, panel

_ACROSS = 4
_GAP, _BETWEEN = 0.18, 0.32
_LEFT, _BOTTOM = 0.56, 0.42


class Multiples:
    """A figure with a panel for each title, at most four side by side.

    Attributes:
        figure: the whole.
        axes: one for each title; `finish` takes the tick labels from those inside.
    """

    def __init__(self, titles: Sequence[Any], keys: int, right: float = 0.16) -> None:
        """Lay out the panels, with room for so many entries of a key above them.

        Args:
            titles: one for each panel.
            keys: entries of the key.
            right: inches to leave on the right.
        """
        self._right = right
        across = min(len(titles), _ACROSS)
        down = math.ceil(len(titles) / across)
        alone = across == 1
        width = COLUMN if alone else PAGE
        wide = (width - _LEFT - self._right - (across - 1) * _GAP) / across
        tall = 1.9 if down == 1 else 1.4
        self._columns = 2 if alone else 4
        self._top = 0.26 + 0.16 * math.ceil(keys / self._columns)
        height = self._top + _BOTTOM + down * tall + (down - 1) * _BETWEEN
        self.figure = Figure((width, height))
        self.axes: list[Axes] = []
        for at, title in enumerate(titles):
            row, column = divmod(at, across)
            bottom = height - self._top - tall - row * (tall + _BETWEEN)
            axes = panel(self.figure, _LEFT + column * (wide + _GAP), bottom, wide, tall)
            axes.set_title(name(title, int(wide / 0.066)), pad=3)
            self.axes.append(axes)

    def finish(self, x: str, y: str, handles: list[Any]) -> Figure:
        """Label the axes once for all panels, and add the key."""
        width, height = self.figure.get_size_inches()
        across = min(len(self.axes), _ACROSS)
        for at, axes in enumerate(self.axes):
            if at % across:
                hide_labels(axes.yaxis)
            if at + across < len(self.axes):
                hide_labels(axes.xaxis)
        middle = (_BOTTOM + height - self._top) / 2 / height
        center = (_LEFT + width - self._right) / 2 / width
        self.figure.text(0.04 / width, middle, y, rotation=90, va="center", ha="left")
        self.figure.text(center, 0.05 / height, x, va="bottom", ha="center")
        key(self.figure, _LEFT, 0.06, handles, ncols=self._columns)
        return self.figure
