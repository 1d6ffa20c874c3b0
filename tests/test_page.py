"""The pieces of the report page: colours of maps and masks, tables, curves, scatter plots."""
import re

import numpy as np
import pytest
from PIL import Image

from plumbing import page


def test_colours_of_maps_and_masks():
    image = Image.new("RGB", (8, 4), (100, 100, 100))
    hot = np.asarray(page.show_map(image, np.linspace(-3, 5, 8)[None].repeat(4, 0)))
    assert hot[0, 0].tolist() == [44, 37, 67] and hot[0, -1].tolist() == [206, 208, 144]  # .3 grey, .7 colour
    mask = np.zeros((4, 8), np.uint8)
    mask[:, 4:6], mask[:, 6:] = 1, 255
    shown = np.asarray(page.show_mask(image, mask))
    assert shown[0, 0].tolist() == [205] * 3 and shown[0, 4].tolist() == [123, 15, 15]
    assert set(shown[:, 6:].ravel().tolist()) == {90, 255}
    for size, shown in (((60, 30), (240, 120)), ((900, 1), (240, 1))):
        assert page.fit(Image.new("RGB", size)).size == shown


def test_elements():
    assert page.tag("b", "x", 0, kind="k", x=0, style="") == '<b class="k" x="0">x0</b>'
    assert page.figure(Image.new("RGB", (2, 2)), "a < b", "1/2").count("a &lt; b") == 2
    own = page.tag("td", "b", kind="bar")
    assert page.table([["x", "y"], ["a", own], ["c", "d"]]) == (
        '<div class="scroll"><table><tr><th>x</th><th>y</th></tr><tr><th>a</th><td class="bar">b</td></tr>'
        "<tr><th>c</th><td>d</td></tr></table></div>")


def test_a_curve_fills_its_box():
    drawn = page.chart("loss", [(5, 2.0), (10, 1.0), (15, 3.0)], "big")
    assert re.search(r'points="(.*?)"', drawn)[1] == "46.0,57.0 190.0,108.0 334.0,6.0"
    assert re.findall(r">([^<>]+)</text>", drawn) == ["3", "1", "5", "15"] and "<b>3</b>" in drawn
    assert "nan" not in page.chart("constant", [(7, 0.5)])


def test_scatter_keeps_proportions_and_marks_each_class():
    points, marks = np.array([[0.0, 0], [3, 1], [1, 1]]), np.array([[0.0, 0], [2, 2], [9, 9]])
    drawn = page.scatter(points, np.array([0, 0, 1]), marks[:2], ["a", "<b>"])
    x, y = (np.array(re.findall(rf'<circle[^>]* c{axis}="(.*?)"', drawn), float) for axis in "xy")
    scale = (x[1] - x[0]) / 3
    assert y[0] - y[1] == pytest.approx(scale, abs=0.11) and scale == pytest.approx(310 / 3, abs=0.1)
    assert drawn.count("<path") == 2 and drawn.count("&lt;b&gt;") == 3 and "<b>" not in drawn
