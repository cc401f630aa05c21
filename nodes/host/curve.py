"""The loss so far as a small picture, for the preview on a node that trains."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

SIZE, EDGE = (480, 240), 34  # pixels
GREY, BLUE, DARK = (214, 214, 214), (0, 90, 181), (60, 60, 60)
SMOOTH = 0.05  # share of the points that one point of the line averages over


def curve(losses: Mapping[int, float]) -> Image.Image:
    """Loss over steps: every value in grey, their moving average in blue."""
    picture = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(picture)
    steps, values = list(losses), list(losses.values())
    low, high = min(values), max(values)
    left, top, right, bottom = EDGE, 18, SIZE[0] - 8, SIZE[1] - EDGE

    def points(heights: list[float]) -> list[tuple[float, float]]:
        width, height = max(steps[-1] - steps[0], 1), max(high - low, 1e-12)
        return [
            (
                left + (step - steps[0]) / width * (right - left),
                bottom - (value - low) / height * (bottom - top),
            )
            for step, value in zip(steps, heights, strict=True)
        ]

    draw.line([(left, top), (left, bottom), (right, bottom)], fill=DARK)
    if len(values) > 1:
        draw.line(points(values), fill=GREY)
        draw.line(points(average(values)), fill=BLUE, width=2)
    draw.text((left, 2), f"loss {average(values)[-1]:.4f} (average)", fill=BLUE)
    for place, value in ((top, high), (bottom - 10, low)):
        draw.text((2, place), f"{value:.2f}", fill=DARK)
    draw.text((left, bottom + 6), f"step {steps[0]}", fill=DARK)
    draw.text((right - 60, bottom + 6), f"step {steps[-1]}", fill=DARK)
    return picture


def average(values: Sequence[float]) -> list[float]:
    """Each value's mean with those just before it."""
    span = max(1, round(len(values) * SMOOTH))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [
        (sums[i + 1] - sums[max(0, i + 1 - span)]) / (i + 1 - max(0, i + 1 - span))
        for i in range(len(values))
    ]
