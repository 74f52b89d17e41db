"""docs/methods.md is what the code says."""

from pathlib import Path

from anabranch.merge import METHODS
from anabranch.merge.reference import markdown

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == markdown(), "run `python -m anabranch.merge.reference > docs/methods.md`"


def test_every_method_and_parameter_stands_in_it():
    text = PAGE.read_text()
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert sections.keys() == METHODS.keys()
    for name, method in METHODS.items():
        assert method.reference in sections[name] and all(f"{p.name}: " in sections[name] for p in method.parameters)
