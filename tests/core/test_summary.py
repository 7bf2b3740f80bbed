"""Objects say in a line what they are, and in notebooks in a table."""

from __future__ import annotations

from html.parser import HTMLParser

from sgdgp.core.summary import Summarised, html_table


class Thing(Summarised):
    def __init__(self, **facts):
        self._given = facts

    def _facts(self):
        return self._given


class Cells(HTMLParser):
    """Texts of a table by row; every tag that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.texts, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag == "br":
            self.rows[-1][-1] += "\n"
            return
        self.open.append(tag)
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        else:
            self.texts.append(data)


def test_the_line_has_every_fact_in_order_and_short():
    line = repr(Thing(points=20_000, solver="sdd", passes=31.2345, residual=9.8765e-7))
    assert line == "Thing(points=20000, solver='sdd', passes=31.2, residual=9.88e-07)"


def test_long_tuples_are_shortened_and_short_ones_are_not():
    line = repr(Thing(few=(0.12345, 2.0), one=(3,), many=tuple(range(65)), none=None))
    assert line == "Thing(few=(0.123, 2), one=(3,), many=(0, ..., 64), none=None)"


def test_sentences_are_counted_in_the_line_and_written_out_in_the_table():
    thing = Thing(warnings=("Too few passes.", "Noise < 0?"), reason="budget")
    assert repr(thing) == "Thing(warnings=2, reason='budget')"
    rows = Cells(thing._repr_html_()).rows
    assert rows == [["warnings", "Too few passes.\nNoise < 0?"], ["reason", "budget"]]
    assert repr(Thing(warnings=(), reason="steps")) == "Thing(reason='steps')"


def test_the_table_escapes_and_reads_well():
    evil = "<script>alert(1)</script>"
    thing = Thing(num_samples=20_000, noise=None, exact=True, solver=evil)
    text = thing._repr_html_()
    assert "<script>" not in text
    found = Cells(text)
    assert found.texts == ["Thing"]
    assert found.rows == [
        ["num samples", "20,000"],
        ["exact", "True"],
        ["solver", "<script>alert(1)</script>"],
    ]


def test_a_table_of_scores_has_sentences_below():
    found = Cells(html_table("Scores", [["", "nll"], ["a & b", "0.1"]], "It's <a>."))
    assert found.rows == [["", "nll"], ["a & b", "0.1"]]
    assert found.texts == ["Scores", "It's <a>."]
