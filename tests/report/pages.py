"""A page of a report, read as a browser would."""

import html.parser

VOID = {"meta", "br", "img", "link", "input", "hr", "wbr"}


class Page(html.parser.HTMLParser):
    """Elements with their attributes, visible text, tables by label; fails on unbalanced tags."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.source = source
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.label = ""
        self.glue = False
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)
        if attrs.get("role") == "region":
            self.label = attrs["aria-label"]
        if tag == "table":
            self.tables[self.label] = []
        if tag == "tr":
            self.tables[self.label].append([])
        if tag in ("td", "th"):
            self.tables[self.label][-1].append("")
        self.glue = tag == "wbr"

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        if "script" in self.open:
            self.scripts.append(data)
            return
        space, self.glue = "" if self.glue else " ", False
        if {"td", "th"} & set(self.open):
            row = self.tables[self.label][-1]
            row[-1] = " ".join(f"{row[-1]}{space}{data}".split())
        self.words.append(data if space else self.words.pop() + data)
