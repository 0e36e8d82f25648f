"""Text in figures: numbers as people write them, and names that fit."""

import functools
import math
import textwrap

from matplotlib.font_manager import findfont, get_font

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 3) -> str:
    """Write a number with so many significant digits, and a true minus sign.

    >>> number(-0.12345), number(1500.2), number(1e-7), number(float("inf"))
    ('−0.123', '1500', '10⁻⁷', '∞')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if 1 <= abs(value) < 99999.5:
        digits = max(digits, len(f"{abs(value):.0f}"))
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    text = mantissa.replace("-", "−")
    if not exponent:
        return text
    power = "10" + str(int(exponent)).translate(_RAISED)
    return {"1": power, "−1": "−" + power}.get(text, f"{text}·{power}")


def decade(value: float) -> str:
    """Write a power of ten.

    >>> decade(0.001), decade(1.0), decade(10.0), decade(100.0)
    ('10⁻³', '1', '10', '10²')
    """
    exponent = round(math.log10(value))
    return {0: "1", 1: "10"}.get(exponent, "10" + str(exponent).translate(_RAISED))


def beta_name(beta: float, digits: int = 3) -> str:
    """Write a value of β; NaN stands for a run in which each instance has its own."""
    return "own β" if math.isnan(beta) else number(beta, digits)


def name(value: object, width: int, lines: int = 1) -> str:
    r"""Make a name, which may be a whole prompt, fit into lines of so many characters.

    Line breaks and other control characters become spaces, and characters that the font lacks
    become boxes. What does not fit is cut off, and the cut is marked.

    >>> name("a prompt that\nis rather long", 12, 2)
    'a prompt\nthat is…'
    """
    if isinstance(value, float):  # a name that reads as a number comes back from CSV as one
        value = f"{value:.15g}"
    drawable = _drawable()
    shown = "".join(c if ord(c) in drawable else "□" for c in " ".join(str(value).split()))
    wrapped = textwrap.wrap(shown, width, max_lines=lines, placeholder="…", break_on_hyphens=False)
    return "\n".join(wrapped)


@functools.cache
def _drawable() -> frozenset[int]:
    """Code points that the figures' font can draw."""
    return frozenset(code for code in get_font(findfont("DejaVu Sans")).get_charmap() if code > 31)
