"""The pages: those written from the code are up to date, their code runs, their settings and commands exist."""

import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer
import yaml
from pydantic import ValidationError

from foldkernels.cli.main import app
from foldkernels.configs.data import DataConfig
from foldkernels.configs.kernel import KernelConfig
from foldkernels.configs.options import FoldkernelsConfig

from ..support.pages import Block, blocks, commands, inline_commands, pages

#: What mkdocs takes from beside docs/, and what the site calls it.
ADOPTED = {"contributing.md", "changelog.md", "small-model.md"}


def writer(root, name):
    """One of the programs in docs/."""
    specification = importlib.util.spec_from_file_location(name, root / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def in_a_process(root, *command, cwd=None, path=(), timeout=900):
    """A command of this Python's, with `foldkernels` as it is here."""
    home = str(Path(importlib.util.find_spec("foldkernels").origin).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), home, *sys.path])}
    for name in [name for name in environment if name.startswith("FOLDKERNELS_")]:
        del environment[name]
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd or root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


# Written from the code ------------------------------------------------------------------------------------------------


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


def test_the_pages_of_kernels_are_up_to_date(root):
    """From the registry and the operations' docstrings; `python docs/write_kernels.py` writes them again."""
    wanted = writer(root, "write_kernels").pages()
    assert sorted(wanted) == sorted((root / "docs" / "kernels").glob("*.md")), "one page an operation, and the index"
    stale = [page.name for page, text in wanted.items() if page.read_text(encoding="utf-8") != text]
    assert stale == [], "python docs/write_kernels.py"


# Links and the plan of the site ---------------------------------------------------------------------------------------


def anchors(page):
    """What a link to a page may name behind `#`: its headings, as mkdocs and GitHub call them."""
    slugify = pytest.importorskip("markdown.extensions.toc", reason="headings need the extra [docs]").slugify
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slugify(heading.replace("`", ""), "-") for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)}


def dead_links(root):
    """Links to a file that is not there, or to a heading that the page does not have."""
    found, dead = 0, []
    for page in [*pages(root), root / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            found += 1
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                dead.append(f"{page.relative_to(root)}: {link}")
    assert found
    return dead


def test_every_link_leads_somewhere(root):
    assert dead_links(root) == []


def test_a_dead_link_is_seen(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("[a](docs/a.md#two-words) [b](docs/none.md) [c](docs/a.md#three)\n")
    (tmp_path / "CONTRIBUTING.md").write_text("")
    (tmp_path / "docs" / "a.md").write_text("# Two words\n```\n# three\n```\n[up](#two-words)\n")
    assert dead_links(tmp_path) == ["README.md: docs/none.md", "README.md: docs/a.md#three"]


def nav(root):
    """Every page that the site's plan names."""

    def walk(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in walk(part)]

    return walk(yaml.safe_load((root / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


def test_every_page_has_a_place_in_the_site(root):
    """Each page of docs/ stands in the plan in mkdocs.yml once, and nothing else does."""
    there = {str(page.relative_to(root / "docs")) for page in (root / "docs").rglob("*.md")}
    planned = nav(root)
    assert sorted(planned) == sorted(there | ADOPTED)


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    """The site, built with warnings as errors."""
    pytest.importorskip("material", reason="the site needs the extra [docs]")
    folder = tmp_path_factory.mktemp("site")
    done = in_a_process(root, "-m", "mkdocs", "build", "--strict", "--site-dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_whole_and_fetches_nothing(root, site):
    """Every page of the plan, and no script, font, picture or frame from elsewhere."""
    built = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    assert {page.removesuffix(".md") + ".html" for page in nav(root)} <= built
    fetched = re.compile(r"<(?:script|img|iframe|source|link)[^>]*\s(?:src|href)=\"?(?:https?:)?//")
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not fetched.search(text), page
        assert "fonts.googleapis" not in text and "google-analytics" not in text
    assert not list(site.rglob("*.py")), "the programs in docs/ are no part of the site"


CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


def console(page, folder):
    """What a page writes to the browser's console: from a server, as scripts of pages from a folder are held back."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(page.parent))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = f"--headless=new --no-sandbox --disable-gpu --virtual-time-budget=5000 --user-data-dir={folder}"
        address = f"http://127.0.0.1:{server.server_port}/{page.name}"
        done = subprocess.run(
            [CHROMIUM, *options.split(), "--enable-logging=stderr", "--dump-dom", address],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        server.shutdown()
    assert "<html" in done.stdout
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not here")
def test_a_browser_shows_the_site_without_an_error(site, tmp_path):
    shown, said = console(site / "index.html", tmp_path)
    assert said == []
    assert "Sample from a checkpoint" in shown
    (site / "planted.html").write_text("<html><script>nothing.here()</script><p>text</p></html>")
    assert any("nothing is not defined" in line for line in console(site / "planted.html", tmp_path)[1])


@pytest.mark.slow
def test_a_warning_ends_the_build(root, tmp_path):
    """A page that leads nowhere, beside the others."""
    pytest.importorskip("material", reason="the site needs the extra [docs]")
    hooks = writer(root, "site_hooks")
    for name in ("mkdocs.yml", *hooks.ADOPTED, *hooks.PICTURES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    shutil.copytree(root / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "mac.md").open("a") as page:
        page.write("\n[nowhere](index.md#no-such-heading)\n")
    done = in_a_process(root, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site", cwd=tmp_path)
    assert done.returncode != 0 and "no-such-heading" in done.stdout + done.stderr


# What the pages show --------------------------------------------------------------------------------------------------


def test_every_block_is_of_a_kind_that_is_checked(root):
    """Python is run, YAML is read, commands stand in blocks without a language; what is shown alone is `text`."""
    found = blocks(root)
    assert {block.language for block in found} <= {"python", "yaml", "toml", "text", ""}
    wrong = [f"{b.page}:{b.line}" for b in found if b.reason and (b.language != "python" or len(b.reason.split()) < 3)]
    assert wrong == [], "a tag stands before Python, with a reason"
    assert {block.page for block in found if block.language == "python"} >= {"README.md", "docs/index.md"}


def run_pages(root, folder):
    """What the runner says of the pages of `root`."""
    runner = Path(__file__).parents[1] / "support" / "run_pages.py"
    done = in_a_process(root, runner, root, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each page is forked, and this system cannot")
def test_the_python_of_the_pages_runs(root, tmp_path):
    report = run_pages(root, tmp_path)
    assert report["wrong"] == []
    runnable = [block for block in blocks(root) if block.language == "python" and not block.reason]
    assert report["blocks"] == len(runnable) > 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each page is forked, and this system cannot")
def test_python_that_is_wrong_is_seen(tmp_path):
    """Of five pages three are wrong: by an error, by what another page defines, and by ending the process."""
    root, folder = tmp_path / "root", tmp_path / "folder"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text("```python\nfolder = '.'\n```\ntext\n```python\nopen(folder + '/none')\n```\n")
    (root / "docs" / "a.md").write_text("```python\nprint(folder)\n```\n")
    (root / "docs" / "b.md").write_text("<!-- not run: it would end the world -->\n```python\n1 / 0\n```\n")
    (root / "docs" / "c.md").write_text(
        '```python title="mine.py"\nhere = 1\n```\n'
        "<!-- run before, by the tests:\nbefore = 1\n-->\n"
        "```python\nimport mine\nassert mine.here == before\n```\n"
    )
    (root / "docs" / "d.md").write_text("```python\nimport os\nos.abort()\n```\n")
    report = run_pages(root, folder)
    assert report["blocks"] == 6
    assert [wrong.partition(" ")[0] for wrong in report["wrong"][:2]] == ["README.md:6:", "docs/a.md:2:"]
    assert "FileNotFoundError" in report["wrong"][0] and "NameError" in report["wrong"][1]
    assert len(report["wrong"]) == 3 and "ended with status" in report["wrong"][2]


SECTIONS = {"kernel": KernelConfig, "foldkernels": FoldkernelsConfig, "data": DataConfig}


def check_yaml(block: Block) -> None:
    """A block parses, and what it says of a section is what the section may hold."""
    content = yaml.safe_load(block.text)
    for name, model in SECTIONS.items():
        if isinstance(content, dict) and name in content:
            model.model_validate(content[name])


def test_the_settings_of_the_pages_exist(root):
    checked = 0
    for block in blocks(root):
        if block.language == "yaml":
            check_yaml(block)
            checked += any(f"{name}:" in block.text for name in SECTIONS)
    assert checked >= 8


@pytest.mark.parametrize(
    "text",
    [
        "kernel: flsh\n",
        "kernel: {attentoin: torch}\n",
        "kernel: {preset: auto, fallback: loud}\n",
        "foldkernels:\n  enrichment: {block: pairformer, layers: 4}\n",
        "foldkernels: {esm: x}\n",
        "data: {crop: {size: 256}}\n",
    ],
)
def test_settings_that_do_not_exist_are_seen(text):
    with pytest.raises(ValidationError):
        check_yaml(Block("page", 1, "yaml", "", text, "", ""))


#: What typer raises of a command line that it cannot read; it brings a click of its own.
REFUSED = typer.BadParameter.__bases__[0]


def parse(words: list[str]) -> None:
    """Read a command line without running it: the sub-command, its options and their values must exist."""
    command = typer.main.get_command(app)
    if "--help" in words or "-h" in words:
        assert words[0] == "COMMAND" or words[0] in command.commands
        return
    context = command.context_class(command, info_name="foldkernels")
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, words)
        if hasattr(command, "commands"):
            context = command.make_context(name, words, parent=context)
            words = [*context._protected_args, *context.args]
    command.make_context(name, words, parent=context)


def test_the_commands_of_the_pages_exist(root):
    wrong, found = [], list(commands(root))
    for page, line, words in found:
        try:
            parse(words)
        except REFUSED as error:
            wrong.append(f"{page}:{line}: {error.message}")
    assert wrong == []
    assert len(found) > 12


def test_the_commands_in_running_text_exist(root):
    """Of these only the command and its options: the text leaves out what stands elsewhere."""
    known = typer.main.get_command(app).commands
    for page, line, words in inline_commands(root):
        if words[0] == "COMMAND":
            continue
        assert words[0] in known, f"{page}:{line}: there is no command {words[0]!r}"
        options = {o for parameter in known[words[0]].params for o in (*parameter.opts, *parameter.secondary_opts)}
        strange = [word for word in words[1:] if word.startswith("-") and word.partition("=")[0] not in options]
        assert not strange or hasattr(known[words[0]], "commands"), f"{page}:{line}: {strange}"


@pytest.mark.parametrize(
    "line",
    ["smple weights/ --out out/", "sample weights/ --out out/ --lenght 3", "sample --out out/", "doctor --fast"],
)
def test_commands_that_do_not_exist_are_seen(line):
    with pytest.raises(REFUSED):
        parse(line.split())


def test_the_readme_is_short_and_names_every_command(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 115
    missing = [name for name in typer.main.get_command(app).commands if f"foldkernels {name}" not in text]
    assert missing == []


# The kernel of one's own ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_kernel(root, tmp_path):
    """A folder with the page's kernel, its entry point, and its YAML."""
    page = [block for block in blocks(root) if block.page == "docs/your-own-kernel.md"]
    (example,) = [block for block in page if block.title == "rows.py"]
    assert len(example.text.splitlines()) < 40
    (tmp_path / "rows.py").write_text(example.text, encoding="utf-8")
    (settings,) = [block for block in page if block.language == "yaml"]
    (tmp_path / "config.yaml").write_text(settings.text, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_the_kernel_of_ones_own_holds_the_contract(root, own_kernel):
    """By the contract tests, as the page says. What the page itself checks is run with its Python, in `make test`."""
    done = in_a_process(
        root,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "rows", "tests/test_kernel_contract.py"),
        *("-k", "triangle_attention-rows"),
        path=[own_kernel],
        timeout=1800,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-3000:] + done.stderr[-2000:]
    assert int(passed[1]) > 100


def test_the_kernel_of_ones_own_is_found_and_chosen_by_name(root, own_kernel):
    """In a package with the page's entry point: nobody imports it, and the page's YAML chooses it."""
    package = own_kernel / "mypackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (own_kernel / "rows.py").rename(package / "rows.py")
    (toml,) = [b for b in blocks(root) if b.page == "docs/your-own-kernel.md" and b.language == "toml"]
    header, line = toml.text.splitlines()
    assert header == '[project.entry-points."foldkernels.kernels"]'
    about = own_kernel / "mypackage-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[foldkernels.kernels]\n{line.replace(chr(34), '')}\n")
    program = """
import torch, yaml, foldkernels
from foldkernels.modules.triangle_attention import TriangleAttention
layer = TriangleAttention(32, 16, 2)
foldkernels.bind(layer, yaml.safe_load(open("config.yaml"))["kernel"])
with foldkernels.record_kernels() as ran:
    layer(torch.randn(1, 9, 9, 32), torch.ones(1, 9, 9))
print(ran)
"""
    done = in_a_process(root, "-c", program, cwd=own_kernel, path=[own_kernel])
    assert done.stdout.strip() == "['triangle_attention: rows']", done.stderr[-3000:]
