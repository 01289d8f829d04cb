"""Every Python snippet of the README and the docs runs."""

import re
from pathlib import Path

import pytest

import tilewise as tw
from docs.figures import hero, house

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPETS = [
    pytest.param(code, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet_runs(code):
    exec(compile(code, "snippet", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_pages_name_exist(page):
    """With or without their suffix, and the package's without its folder."""
    folders = "csrc|kernels|tests|benchmarks|examples|docs|pyext|ops|reference|nn"
    for name in re.findall(rf"`((?:{folders})/[\w./]+)`", page.read_text()):
        found = [*ROOT.glob(f"{name}*"), *(ROOT / "pyext/tilewise").glob(f"{name}*")]
        assert found, f"{page.name} names {name}"


def test_readme_names_everything_that_is_public():
    listed = (ROOT / "README.md").read_text().partition("## Everything there is")[2]
    modules = tw.estimators, tw.evaluation, tw.smooth
    functions = {
        name for module in modules for name, f in vars(module).items()
        if callable(f) and getattr(f, "__module__", "").startswith(module.__name__)
    }
    public = {x for x in {*dir(tw), *functions} if x[0] != "_"} - {"ops", "kernels", "nn"}
    names = sorted(public | set(tw.nn.__all__))
    assert [name for name in names if not re.search(rf"\b{name}\b", listed)] == []


@pytest.mark.parametrize("figure", [hero, house], ids=lambda figure: figure.PATH.stem)
def test_drawings_are_what_their_scripts_draw(figure, tmp_path):
    """The words in them, that is: they name files, and quote benchmarks/results."""
    drawn, committed = (
        re.findall(r"<text[^>]*>(.*?)</text>", path.read_text())
        for path in (figure.main(tmp_path / "drawn.svg"), figure.PATH)
    )
    assert drawn == committed and len(drawn) > 10
