"""The pages that are written from the code are up to date."""

import importlib.util


def test_the_page_of_settings_is_up_to_date(root):
    """docs/configuration.md is written from the code; `python docs/write_configuration.py` writes it again."""
    specification = importlib.util.spec_from_file_location("write", root / "docs" / "write_configuration.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page()
