"""An evaluation as one picture: SVG by hand, since bars, dots and lines need no library.

Left: LDS with its interval, a row per method and fraction kept. Right: the measurement as the top-scored are left out, against
leaving out at random.
"""

from html import escape

from attribution.engine.evaluation import LDS, Evaluated, Evaluation

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe & Ito: for every eye
GREY = "#767676"
ROW, BAR, PANEL, GAP, TOP = 20, 6, 330, 70, 44
LETTER = 6.4  # pixels, of a wide one


def evaluation_svg(result: Evaluation) -> str:
    """A whole SVG document, readable on white and without color."""
    rows = [(method, lds) for method in result.methods for lds in method.lds]
    height = max(260, TOP + ROW * len(rows) + 56)
    left = 16 + int(LETTER * max(len(_label(method, lds)) for method, lds in rows))
    width = left + PANEL + 40
    parts = _lds_panel(result, rows, left, height)
    if result.random:
        parts += _curve_panel(result, left + PANEL + GAP, height)
        width = (
            left + GAP + 2 * PANEL + 16 + int(LETTER * max(len("at random"), *(len(m.name) for m in result.methods)))
        )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11" role="img">\n'
        f"<title>Attribution methods against retraining</title>\n"
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n{body}\n</svg>\n'
    )


def _lds_panel(result: Evaluation, rows: list[tuple[Evaluated, LDS]], left: int, height: int) -> list[str]:
    low = min([0.0, *(lds.low for _, lds in rows)])
    floor = -1.0 if low < -0.2 else low

    def x(value: float) -> float:
        return left + PANEL * (value - floor) / (1 - floor)

    bottom = height - 40
    parts = [_text(left, 20, "LDS: does it predict retraining? (95 % interval)", bold=True)]
    for tick in (t / 4 for t in range(-4, 5)):
        if tick >= floor:
            parts.append(_line(x(tick), TOP - 8, x(tick), bottom, "#ddd"))
            parts.append(_text(x(tick), bottom + 16, f"{tick:g}", anchor="middle"))
    parts.append(_line(x(0), TOP - 8, x(0), bottom, GREY))
    for number, (method, lds) in enumerate(rows):
        y = TOP + ROW * number + ROW / 2
        color = _color(result, method.name)
        parts.append(_text(left - 8, y + 4, _label(method, lds), anchor="end"))
        parts.append(
            f'<rect x="{min(x(0), x(lds.lds)):.1f}" y="{y - BAR / 2}" width="{abs(x(lds.lds) - x(0)):.1f}" '
            f'height="{BAR}" fill="{color}" opacity="0.35"/>'
        )
        parts.append(_line(x(lds.low), y, x(lds.high), y, color))
        parts.append(f'<circle cx="{x(lds.lds):.1f}" cy="{y}" r="3.5" fill="{color}"/>')
    return parts


def _curve_panel(result: Evaluation, left: int, height: int) -> list[str]:
    bottom = height - 40
    curves = [(method.name, _color(result, method.name), method.leave_out) for method in result.methods]
    shown = [result.measurement, *(p.high for p in result.random), *(p.low for p in result.random)]
    shown += [point.measurement for _, _, points in curves for point in points]
    low, high = min(shown), max(shown)
    high = high if high > low else low + 1
    widest = max(point.fraction for point in result.random)

    def x(fraction: float) -> float:
        return left + PANEL * fraction / widest

    def y(measurement: float) -> float:
        return bottom - (bottom - TOP) * (measurement - low) / (high - low)

    parts = [_text(left, 20, "Measurement after leaving out the top-scored", bold=True)]
    for tick in (low, (low + high) / 2, high):
        parts.append(_line(left, y(tick), left + PANEL, y(tick), "#ddd"))
        parts.append(_text(left - 6, y(tick) + 4, f"{tick:.3g}", anchor="end"))
    parts += [_text(x(p.fraction), bottom + 16, f"{100 * p.fraction:g} %", anchor="middle") for p in result.random]
    band = [(x(p.fraction), y(p.high)) for p in result.random] + [
        (x(p.fraction), y(p.low)) for p in result.random[::-1]
    ]
    start = (x(0), y(result.measurement))
    parts.append(f'<polygon points="{_points([start, *band])}" fill="{GREY}" opacity="0.2"/>')
    ends = []
    for name, color, points in [("at random", GREY, result.random), *curves]:
        line = [start, *((x(p.fraction), y(p.measurement)) for p in points)]
        parts.append(f'<polyline points="{_points(line)}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.5" fill="{color}"/>' for px, py in line[1:]]
        ends.append((line[-1][1], name, color))
    above = -1e9
    for end, name, color in sorted(ends):  # labels keep a line's distance
        above = max(end, above + 13)
        parts.append(_text(left + PANEL + 8, above + 4, name, color=color))
    return parts


def _label(method: Evaluated, lds: LDS) -> str:
    return f"{method.name}, {100 * lds.kept:g} % kept"


def _color(result: Evaluation, name: str) -> str:
    return COLORS[[method.name for method in result.methods].index(name) % len(COLORS)]


def _points(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in points)


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False, color: str = "#222") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"{weight}>{escape(text)}</text>'
