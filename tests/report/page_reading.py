"""Reads a page as a tree, so that tests ask for what is there and not for how it is written."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br"}


@dataclass
class Element:
    name: str
    attributes: dict
    parent: "Element | None" = None
    inside: list = field(default_factory=list)

    def all(self, name=None, **attributes):
        """Every element below, in order, of this name and with these attributes; `class_` asks for one of its classes."""
        for part in self.inside:
            if isinstance(part, Element):
                if (name is None or part.name == name) and all(part.has(key, value) for key, value in attributes.items()):
                    yield part
                yield from part.all(name, **attributes)

    def one(self, name=None, **attributes):
        found = list(self.all(name, **attributes))
        assert len(found) == 1, f"{len(found)} elements {name} {attributes}"
        return found[0]

    def has(self, key, value):
        given = self.attributes.get(key.rstrip("_").replace("_", "-"))
        return value in given.split() if key == "class_" and given else given == value

    @property
    def text(self):
        return "".join(part if isinstance(part, str) else part.text for part in self.inside)


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.root = self.at = Element("", {})

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs), self.at)
        self.at.inside.append(element)
        if tag not in VOID:
            self.at = element

    def handle_endtag(self, tag):
        assert self.at.name == tag, f"</{tag}> closes <{self.at.name}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.inside.append(data)


def parsed(page: bytes) -> Element:
    """Return the page's root. Fails where an element is closed that is not open, or stays open."""
    reader = _Reader()
    reader.feed(page.decode("utf-8"))
    reader.close()
    assert reader.at is reader.root, f"<{reader.at.name}> stays open"
    return reader.root
