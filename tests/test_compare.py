"""Labelled grids: every cell is its video, pixel by pixel, and every label is readable and literal."""

from __future__ import annotations

import pytest
import torch

from mimir_core.compare import best_columns, compare, repeated
from mimir_core.labels import MORE, drawable, font, text_block, wrap


def videos(*shapes: tuple[int, int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(*shape, 3, generator=generator) for shape in shapes]


def places(picture: torch.Tensor, video: torch.Tensor, factor: int) -> list[tuple[int, int]]:
    """Where in the first frame `video` is, enlarged `factor` times."""
    frame = video[0].repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    height, width = frame.shape[:2]
    corners = (picture[0] == frame[0, 0]).all(-1).nonzero().tolist()
    return [(y, x) for y, x in corners if torch.equal(picture[0, y : y + height, x : x + width], frame)]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize(("size", "factor"), [(64, 3), (256, 1)])
def test_every_cell_is_its_video_bit_for_bit(count, size, factor):
    shown = videos(*[(5, size, size)] * count)
    picture = compare(shown, [f"video {number}" for number in range(count)])
    assert picture.dtype == torch.float32 and len(picture) == 5
    assert picture.shape[1] % 2 == 0 and picture.shape[2] % 2 == 0
    corners = []
    for video in shown:
        ((y, x),) = places(picture, video, factor)
        corners.append((y, x))
        cell = picture[:, y : y + size * factor : factor, x : x + size * factor : factor]
        assert torch.equal(cell, video)
    assert corners == sorted(corners) and len(set(corners)) == count, "reading order"


def test_a_shorter_video_holds_its_last_frame_and_a_smaller_one_is_centred():
    long, short = videos((9, 200, 300), (3, 100, 201))
    picture = compare([long, short], ["long", "short"], columns=2)
    assert len(picture) == 9
    ((top, left),) = places(picture, long, 1)
    ((y, x),) = places(picture, short, 1)
    assert y == top + 50 and x == left + 300 + 4 + (300 - 201) // 2
    cell = picture[:, y : y + 100, x : x + 201]
    assert torch.equal(cell[:3], short) and torch.equal(cell[3:], short[-1:].expand(6, -1, -1, -1))


def test_labels_grow_with_the_videos():
    """As large in the picture, however large the picture is; never smaller than can be read."""
    small, wide = (compare(videos((1, 40, width)), ["a"]) for width in (480, 1920))
    strips = [picture.shape[1] - 40 - 8 for picture in (small, wide)]
    assert strips[0] == len(text_block("a", 480)) and strips[1] > 2.5 * strips[0]
    assert strips[1] == len(text_block("a", 1920, 48))


def test_videos_that_repeat_another_are_found():
    a, b = videos((2, 8, 8), (2, 8, 8))
    assert repeated([a, b, a.clone(), b[:1], b.clone()]) == {2: 0, 4: 1} and repeated([a, b]) == {}


def test_columns():
    assert [best_columns(count, 200, 200) for count in (1, 2, 3, 8)] == [1, 2, 3, 4]
    narrow, wide = (compare(videos(*[(1, 200, 200)] * 3), list("abc"), columns) for columns in (1, 3))
    assert narrow.shape[1] > narrow.shape[2] and wide.shape[1] < wide.shape[2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": ["one"]}, "1 labels for 2 videos: write one line"),
        ({"videos": [torch.rand(3, 8, 8, 3), torch.rand(8, 8)]}, r"video 2 has shape \(8, 8\)"),
        ({"videos": [], "labels": []}, "at least one video"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    arguments = {"videos": videos((1, 8, 8), (1, 8, 8)), "labels": ["a", "b"], **change}
    with pytest.raises(ValueError, match=words):
        compare(**arguments)


@pytest.mark.parametrize(
    "text",
    [
        "a red circle moves left above a blue square",
        "one_word_that_is_much_longer_than_any_line_can_ever_be_in_this_picture",
        "<script>alert(1)</script> & \"quotes\" 'too'",
        "two\nlines",
        "",
    ],
)
def test_wrapping_keeps_every_character_and_stays_inside(text):
    rows = wrap(text, 120, 14, lines=20)
    assert "".join("".join(rows).split()) == "".join(text.split())
    assert all(font(14).getlength(row) <= 120 for row in rows)
    assert text_block(text, 130).shape[1:] == (130, 3)


def test_long_text_says_that_it_goes_on():
    rows = wrap("word " * 10_000, 120, 14, lines=3)
    assert len(rows) == 3 and rows[-1].endswith(MORE)
    assert all(font(14).getlength(row) <= 120 for row in rows)


def test_what_the_font_lacks_is_written_as_its_code():
    assert drawable("a 中 \U0001f9ff\u202e\x00") == "a \\u4e2d \\U0001f9ff\\u202e\\u0000"
    assert torch.equal(text_block("中", 100), text_block("\\u4e2d", 100))
