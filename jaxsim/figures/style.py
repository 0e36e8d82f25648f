"""How all figures look, and how they become bytes.

Figures are plain `Figure` objects: no pyplot, so there is no window system and no global state.
The settings start from matplotlib's own defaults, so that a user's matplotlibrc changes nothing,
and neither dates nor random identifiers reach the files: equal data give equal bytes.
"""

import functools
from collections.abc import Callable
from io import BytesIO
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Columns = dict[str, list[Any]]
"""The data of a figure: equally long columns, by name."""

COLUMN = 3.5
"""Width in inches of a figure that takes one column of a paper."""
PAGE = 7.0
"""Width in inches of a figure that takes both columns."""

# Okabe and Ito's colours, which colour-blind readers tell apart. Wherever two of them mean
# different things, lightness, a line style, a marker or a hatch says so too.
INK = "#222222"
MUTED = "#6E6E6E"
FAINT = "#C4C4C4"
ALIGNED = "#0072B2"
UNALIGNED = "#E69F00"
FAILING = "#D55E00"

_DRAWN = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelpad": 3.0,
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.0,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same on every machine
    "font.size": 8.0,
    "hatch.linewidth": 0.5,
    "legend.borderaxespad": 0.0,
    "legend.borderpad": 0.0,
    "legend.columnspacing": 1.2,
    "legend.fontsize": 7.0,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.handletextpad": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "mathtext.default": "regular",
    "pdf.fonttype": 42,  # publishers refuse Type 3
    "ps.fonttype": 42,  # matplotlib 3.11 also reads this one for PDF: one font, not two
    "svg.fonttype": "path",
    "svg.hashsalt": "jaxsim",
    "text.color": INK,
    "text.parse_math": False,  # data hold dollar signs; `math=True` where a label needs it
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 7.0,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 7.0,
    "ytick.major.size": 2.5,
    "ytick.major.width": 0.6,
}
_PROCESS_WIDE = {"backend", "backend_fallback", "interactive", "toolbar", "timezone"}
_SETTINGS: Any = {
    name: value
    for name, value in matplotlib.rcParamsDefault.items()
    if name not in _PROCESS_WIDE and not name.startswith(("webagg.", "keymap.", "animation."))
} | _DRAWN

_FORMATS: dict[str, dict[str, Any]] = {
    "pdf": {"metadata": {"CreationDate": None, "Creator": None, "Producer": None}},
    "svg": {"metadata": {"Date": None, "Creator": None}},
    "png": {"metadata": {"Software": None}, "dpi": 200, "pil_kwargs": {"compress_level": 3}},
}

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Have a function draw in this style, whatever the user's settings are."""

    @functools.wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_SETTINGS):
            return draw(*args, **kwargs)

    return inner


def panel(
    figure: Figure, left: float, bottom: float, width: float, height: float, **kwargs: Any
) -> Axes:
    """Add axes, placed in inches from the figure's lower left corner."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up), **kwargs)


def note(figure: Figure, left: float, top: float, text: str, **kwargs: Any) -> None:
    """Write text whose upper left corner is given in inches from that of the figure."""
    across, up = figure.get_size_inches()
    figure.text(left / across, 1 - top / up, text, ha="left", va="top", **kwargs)


def key(figure: Figure, left: float, top: float, handles: list[Any], **kwargs: Any) -> None:
    """Put a legend whose upper left corner is given in inches from that of the figure."""
    across, up = figure.get_size_inches()
    math = kwargs.pop("math", False)
    corner = (left / across, 1 - top / up)
    legend = figure.legend(handles=handles, loc="upper left", bbox_to_anchor=corner, **kwargs)
    for text in legend.get_texts():
        text.set_parse_math(math)


def rendered(figure: Figure) -> dict[str, bytes]:
    """Return the figure as PDF, SVG and PNG (200 dpi), by file extension."""
    files = {}
    with matplotlib.rc_context(_SETTINGS):
        for extension, options in _FORMATS.items():
            buffer = BytesIO()
            figure.savefig(buffer, format=extension, **options)
            files[extension] = buffer.getvalue()
    return files
