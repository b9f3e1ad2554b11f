"""What tests of HTML pages read out of them."""
from html.parser import HTMLParser

VOID = {"meta", "img", "input", "br"}


class Outline(HTMLParser):
    """Checks that tags are balanced, and collects addresses, text and table rows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.text, self.rows = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += text


def row_of(outline, name):
    return next(row[1:] for row in outline.rows if row[0] == name)
