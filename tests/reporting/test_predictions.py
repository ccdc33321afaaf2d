"""Pictures with predictions, and where they are written."""

import pytest
from PIL import Image

from vitrail.errors import ConfigError
from vitrail.reporting.predictions import picture_names, prediction_picture, prediction_writer


def test_picture_names__below_the_common_folder_and_unique():
    images = ["/data/a/one.jpg", "/data/a/one.png", "/data/b/deep/two.gif", "/data/a/one.bmp", "/data/a/v1.2.png"]
    assert list(picture_names(images)) == ["a/one", "a/one_2", "b/deep/two", "a/one_3", "a/v1.2"]
    assert list(picture_names(["/data/one.png"])) == ["one"]


def test_prediction_picture__bars_are_as_long_as_the_probabilities():
    image = Image.new("RGB", (960, 600), "red")
    picture = prediction_picture(image, ["cat", "n07920052"], [0.75, 0.25])
    assert picture.size == (480, 300 + 16 + 2 * 22)
    assert picture.getpixel((240, 150)) == (255, 0, 0)
    lengths = [
        sum(picture.getpixel((x, 300 + 8 + rank * 22 + 17)) == (188, 217, 245) for x in range(480)) for rank in range(2)
    ]
    assert lengths == [pytest.approx(0.75 * 464, abs=3), pytest.approx(0.25 * 464, abs=3)]


def write_one(path, error=None):
    with prediction_writer(path, 1) as write:
        write("a.jpg", ["cat"], [1.0])
        if error:
            raise error


def test_prediction_writer__leaves_no_file_if_it_is_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_one(tmp_path / "found.csv", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []
    write_one(tmp_path / "found.csv")
    assert (tmp_path / "found.csv").read_text().splitlines()[1] == "a.jpg,cat,cat,1.000000"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ConfigError, match=r"out=.*more.csv: cannot be written"):
        write_one(tmp_path / "found.csv" / "more.csv")
