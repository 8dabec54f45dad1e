"""Charts: ticks are round, labels keep apart and inside, what is put in is escaped."""

import re
from itertools import pairwise

import pytest

from vspdf.draw import svg
from vspdf.draw.page import render
from vspdf.draw.words import plain


def test_ticks_are_round_and_inside():
    assert svg.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert svg.ticks(2.13, 2.61) == pytest.approx([2.2, 2.3, 2.4, 2.5, 2.6])
    assert svg.ticks(5, 5) == [5]


def chart(x, y, form=plain):
    curve = svg.Series("a <b>", x, y, 0, dots=True)
    return svg.line_chart([curve], title="t", x_label="x", y_label="y", y_limits=(min(y), max(y)), x_format=form)


@pytest.mark.parametrize("form", [plain, lambda x: f"{x:.4f} thousand tokens"], ids=["short", "long"])
def test_labels_of_an_axis_do_not_collide(form):
    below = [t for t in chart([0, 0.3, 1], [1, 2, 3], form).iter("text") if t.get("y") == "226"]
    places = [(float(t.get("x")), len(t.text) * svg._CHARACTER) for t in below]
    assert places and all(0 <= x - w / 2 and x + w / 2 <= svg.WIDTH + 0.1 for x, w in places)
    assert all(a + wa / 2 < b - wb / 2 for (a, wa), (b, wb) in pairwise(places))


def test_a_long_name_is_cut_and_can_be_read_by_pointing():
    name = "a very long arm of a study - " * 4
    drawn = svg.interval_chart([(name, 0.1, (0.05, 0.2))], title="t", x_label="x")
    assert max(len(text.text) for text in drawn.iter("text")) <= svg.WIDTH / svg._CHARACTER
    assert any(name in title.text for title in drawn.iter("title"))


def test_what_is_put_in_is_escaped(tmp_path):
    template = tmp_path / "own.html"
    template.write_text('{% extends "page.html" %}{% block body %}<p>{{ words }}</p>{{ chart|svg }}{% endblock %}')
    page = render(template, title="<t>", words="<script>", chart=chart([1, 2], [1, 2]))
    assert "<p>&lt;script&gt;</p>" in page and "<title>&lt;t&gt;" in page and "a &lt;b&gt;: 1.0000 at 1" in page
    assert re.search(r"<svg [^>]*viewBox", page)
