"""The label map of each image, with warps and central squares computed by hand on a grid of 4 x 4 cells."""

import numpy as np
import pytest
import torch

from vitrail.data.label_maps import LabelMapJoin, LabelMapStore
from vitrail.errors import ConfigError
from vitrail.types import Geometry, Warp

WHOLE = (0.0, 0.0, 1.0, 1.0)
CELLS = np.arange(16).reshape(4, 4)
NAMES = [str(number) for number in range(16)]


def joined(folder, keys=("c/0",), store_keys=("c/0",), about=None, **options):
    """Join a store whose maps have class 4 * row + column with score 9 in every cell."""
    writer = LabelMapStore.create(folder, len(store_keys), 1, (4, 4), 16, store_keys, **(about or {}))
    for index in range(len(store_keys)):
        writer.write(index, np.full((1, 4, 4), 9.0), CELLS[None])
    return LabelMapJoin(writer.finish(), keys, NAMES, **options)


def test_join__returns_the_stored_map_and_the_view(tmp_path):
    made = joined(tmp_path / "maps")(0, 3, Geometry((0.1, 0.2, 0.5, 0.75), True), (80, 60))
    assert made.classes.dtype == torch.int32
    assert made.classes[0].tolist() == CELLS.tolist()
    assert made.scores.dtype == torch.float16
    assert (made.scores == 9).all()
    torch.testing.assert_close(made.box, torch.tensor([0.1, 0.2, 0.5, 0.75]))
    assert made.flipped.item() is True


SHIFT = Warp((1, 0, 0.25, 0, 1, 0), WHOLE)  # shows at each place what was one cell to the right of it
TRANSPOSE = Warp((0, 1, 0, 1, 0, 0), WHOLE)


@pytest.mark.parametrize(
    ("view", "classes", "outside"),
    [
        (Geometry(WHOLE, False, (SHIFT,)), [[1, 2, 3, None]] * 4, "column 3"),
        (Geometry(WHOLE, True, (SHIFT,)), [[None, 0, 1, 2]] * 4, "column 0"),
        (
            Geometry(WHOLE, False, (Warp((1, 0, 0, 0, 1, -0.5), WHOLE),)),
            [[None] * 4] * 2 + [[0, 1, 2, 3]] * 2,
            "rows 0, 1",
        ),
    ],
    ids=("to the left", "to the left in the mirrored image", "down"),
)
def test_join__warps_move_the_cells(view, classes, outside, tmp_path):
    """`classes` are the expected columns; cells from outside the image have score 0."""
    made = joined(tmp_path / "maps")(0, 3, view, (80, 80))
    rows = [0, 0, 0, 1] if outside.startswith("rows") else [0, 1, 2, 3]
    for row in range(4):
        for column in range(4):
            expected = classes[row][column]
            assert (made.scores[0, row, column] > 0) == (expected is not None), outside
            if expected is not None:
                assert made.classes[0, row, column] == 4 * rows[row] + expected


def test_join__several_warps_in_their_order(tmp_path):
    """Transposed, then shifted by a cell: row r and column c show row c + 1 and column r of the stored map."""
    made = joined(tmp_path / "maps")(0, 3, Geometry(WHOLE, False, (TRANSPOSE, SHIFT)), (80, 80))
    assert made.classes[0, :, :3].tolist() == CELLS.T[:, 1:].tolist()
    assert made.scores[0].bool().tolist() == [[True, True, True, False]] * 4
    made = joined(tmp_path / "other")(0, 3, Geometry(WHOLE, False, (SHIFT, TRANSPOSE)), (80, 80))
    assert made.classes[0, :3].tolist() == CELLS.T[1:].tolist()
    assert made.scores[0].bool().tolist() == [[True] * 4] * 3 + [[False] * 4]


@pytest.mark.parametrize(
    ("size", "columns", "rows"),
    [((200, 100), [None, 1, 3, None], [0, 1, 2, 3]), ((100, 200), [0, 1, 2, 3], [None, 1, 3, None])],
    ids=("landscape", "portrait"),
)
def test_join__map_of_the_central_square_is_placed_in_the_image(size, columns, rows, tmp_path):
    """At 2:1 the square covers the middle half: cells 1 and 2 of 4, whose centres are at 1/4 and 3/4 of the square."""
    made = joined(tmp_path / "maps", about={"coverage": "center square"})(0, 3, Geometry(WHOLE, False), size)
    for row in range(4):
        for column in range(4):
            inside = rows[row] is not None and columns[column] is not None
            assert (made.scores[0, row, column] > 0) == inside
            if inside:
                assert made.classes[0, row, column] == 4 * rows[row] + columns[column]


@pytest.mark.parametrize(
    ("about", "options", "size"),
    [
        ({"coverage": "center square"}, {}, (100, 100)),
        ({"coverage": "center square"}, {"center_square_maps": "stretched"}, (200, 100)),
        ({"coverage": "whole image"}, {}, (200, 100)),
    ],
    ids=("square image", "stretched", "map of the whole image"),
)
def test_join__map_is_unchanged(about, options, size, tmp_path):
    made = joined(tmp_path / "maps", about=about, **options)(0, 3, Geometry(WHOLE, False), size)
    assert made.classes[0].tolist() == CELLS.tolist()
    assert (made.scores == 9).all()


def test_join__missing_map_is_replaced_by_the_label(tmp_path):
    """The label has score 30 in all cells, the other K - 1 entries are other classes with score 0."""
    writer = LabelMapStore.create(tmp_path / "maps", 1, 3, (2, 2), 16, ["c/0"], coverage="center square")
    writer.write(0, np.zeros((3, 2, 2)), np.arange(3)[:, None, None].repeat(2, 1).repeat(2, 2))
    join = LabelMapJoin(writer.finish(), ["c/0", "c/1"], NAMES, on_missing="ignore")
    made = join(1, 15, Geometry(WHOLE, False), (200, 100))
    assert made.classes[:, 0, 0].tolist() == [15, 0, 1]
    assert made.scores[:, 0, 0].tolist() == [30, 0, 0]
    assert (made.classes == made.classes[:, :1, :1]).all()
    assert (made.scores == made.scores[:, :1, :1]).all()


def test_check__ignores_images_without_a_map(tmp_path):
    """Four images, of which two have maps that agree with their labels; wrong labels of these two are refused."""
    writer = LabelMapStore.create(tmp_path / "maps", 2, 1, (1, 1), 2, ["c/1", "c/3"])
    for index in range(2):
        writer.write(index, np.ones((1, 1, 1)), np.full((1, 1, 1), index))
    join = LabelMapJoin(writer.finish(), [f"c/{index}" for index in range(4)], ["a", "b"], on_missing="ignore")
    join.check(np.array([1, 0, 0, 1]))
    with pytest.raises(ConfigError, match=r"data.label_maps=.*: 0.0% of 2 maps agree"):
        join.check(np.array([0, 1, 1, 0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_missing": "skip"}, "on_missing=skip: must be one of error, ignore"),
        ({"center_square_maps": "cut"}, "center_square_maps=cut: must be one of placed, stretched"),
    ],
)
def test_join__invalid_settings_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        joined(tmp_path / "maps", **options)
