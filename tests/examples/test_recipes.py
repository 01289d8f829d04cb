"""The page of all recipes: what is run, what is collected, what is said of one that fails."""

import importlib.util
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("rich") is None or importlib.util.find_spec("matplotlib") is None:
    pytest.skip("the examples extra is not installed", allow_module_level=True)

from examples import recipes  # noqa: E402

EXAMPLES = Path(recipes.__file__).parent
REPORT = """SigLIP on a machine
learning ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 4/4 0:00:01 loss 1.2
┏━━━━┓
┃ a  ┃
Pictures: out/siglip/curves.png,
out/siglip/retrieval.png
16,384 pairs: 9x <faster>,
as measured.
Next: another one.
"""


def test_every_example_is_a_recipe():
    scripts = [path.stem for path in EXAMPLES.glob("*.py") if "def main(" in path.read_text()]
    packages = [path.parent.name for path in EXAMPLES.glob("*/__main__.py")]
    assert {*scripts, *packages} - {"recipes"} == set(recipes.RECIPES)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_readme_has_a_line_for_each(name):
    (line,) = [line for line in (EXAMPLES / "README.md").read_text().splitlines()
               if line.startswith(f"| `python -m examples.{name}`")]  # fmt: skip
    assert line.count("|") == 6


@pytest.fixture
def runs(monkeypatch):
    """Commands, which leave a report where they are told to, but for one that fails."""
    commands = []

    def run(command):
        commands.append(command[1:])
        name, out = command[2].removeprefix("examples."), Path(command[command.index("--out") + 1])
        if name == "bias":
            return SimpleNamespace(returncode=1)
        out.mkdir(exist_ok=True)
        (out / "report.txt").write_text(REPORT)
        (out / "curves.png").write_bytes(b"")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_one_that_fails_does_not_stop_the_others(tmp_path, runs):
    assert recipes.main(["bias", "siglip", "--quick", "--out", str(tmp_path)]) == 1
    assert [command[1] for command in runs] == ["examples.bias", "examples.siglip"]
    assert all("--quick" in command for command in runs)
    text = (tmp_path / "index.html").read_text()
    assert text.count("<span class=failed>failed</span>") == 2  # its row and its section
    assert text.count("16,384 pairs: 9x &lt;faster&gt;, as measured.") == 2
    assert "━━ 4/4" not in text and "┃ a  ┃" in text
    assert "examples.siglip --quick" in text
    assert text.count("<td>not run") == text.count("not run") == len(recipes.RECIPES) - 2


def test_what_was_done_is_not_done_again(tmp_path, runs):
    names = ["siglip", "dfn", "--out", str(tmp_path)]
    assert recipes.main(names) == 0 and len(runs) == 2
    assert recipes.main([*names, "--resume"]) == 0 and len(runs) == 2
    (tmp_path / "dfn" / "run.json").unlink()
    recipes.main([*names, "--collect"])
    assert len(runs) == 2
    recipes.main([*names, "--resume"])
    assert runs[2][1] == "examples.dfn" and len(runs) == 3


def test_what_failed_or_was_another_run_is_done_again(tmp_path, runs):
    out = ["--out", str(tmp_path)]
    (tmp_path / "bias").mkdir()
    (tmp_path / "bias" / "report.txt").write_text(REPORT)  # of an earlier run
    for _ in range(2):
        assert recipes.main(["bias", "--resume", *out]) == 1
    assert len(runs) == 2
    for more in (["--quick"], [], ["--seed", "1"], ["--seed", "1"]):
        recipes.main(["siglip", "--resume", *more, *out])
    assert len(runs) == 5


def test_one_that_was_interrupted_goes_on(tmp_path, runs, monkeypatch):
    def killed(command):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", killed)
        for name in ("dfn", "smooth"):
            with pytest.raises(KeyboardInterrupt):
                recipes.main([name, "--out", str(tmp_path)])
    recipes.main(["dfn", "smooth", "siglip", "--resume", "--out", str(tmp_path)])
    assert ["--resume" in command for command in runs] == [True, False, False]
    assert not recipes.collect("dfn", tmp_path).failed


def test_those_that_go_on_take_the_flag():
    for name in recipes.RECIPES:
        script = EXAMPLES / f"{name}.py"
        text = (script if script.exists() else EXAMPLES / name / "__main__.py").read_text()
        assert ("resumes=False" in text) == (name in recipes.ANEW)


def test_the_page_is_whole(tmp_path, runs):
    """Tags that open are closed, and pictures are where the page looks for them."""
    recipes.main(["siglip", "--out", str(tmp_path)])
    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append((tag, dict(attributes)))

        def handle_endtag(self, tag):
            seen.append((f"/{tag}", {}))

    Reader().feed((tmp_path / "index.html").read_text())
    tags = [tag for tag, _ in seen]
    for tag in ("html", "style", "table", "h1", "h2", "pre", "b", "code", "a", "title"):
        assert tags.count(tag) == tags.count(f"/{tag}"), tag
    pictures = [tmp_path / found["src"] for tag, found in seen if tag == "img"]
    assert pictures == [tmp_path / "siglip" / "curves.png"] and pictures[0].exists()
    anchors = {found["href"][1:] for tag, found in seen if tag == "a"}
    assert anchors == {found["id"] for tag, found in seen if tag == "h2"} == {"siglip"}


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        recipes.main(["siglop"])
    assert "no recipe is called siglop" in capsys.readouterr().err
