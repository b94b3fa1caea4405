"""The pages that are written from the code are up to date."""

import importlib.util
import re
import sys


def writer(root, name):
    """One of the programs in docs/."""
    specification = importlib.util.spec_from_file_location(name, root / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_page_of_settings_is_up_to_date(root):
    """docs/configuration.md is written from the code; `python docs/write_configuration.py` writes it again."""
    module = writer(root, "write_configuration")
    assert module.PAGE.read_text(encoding="utf-8") == module.page()


def test_the_pages_of_accelerate_are_up_to_date(root, monkeypatch):
    """From the adapters and the rows that were measured; `python docs/write_accelerate.py` writes them again."""
    monkeypatch.setattr(sys, "path", [str(root), *sys.path])
    module = writer(root, "write_accelerate")
    assert module.CLASSES.read_text(encoding="utf-8") == module.classes()
    assert module.PAGE.read_text(encoding="utf-8") == module.page()


def test_every_link_to_a_page_leads_somewhere(root):
    links = [
        (page, link)
        for page in (root / "docs").rglob("*.md")
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    ]
    assert links
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []
