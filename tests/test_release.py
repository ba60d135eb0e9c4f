"""What a release says of itself: its addresses, its page on PyPI, its changelog."""

import fnmatch
import os
import re
import runpy
import tomllib
from pathlib import Path

import pytest

import sophia_optax

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
URLS = PYPROJECT["project"]["urls"]
OWNER, NAME = URLS["Repository"].removeprefix("https://github.com/").split("/")

# Owner and name, wherever an address has them.
PLACES = [
    r"github\.com[/:]([\w.-]+)/([\w.-]+)",
    r"raw\.githubusercontent\.com/([\w.-]+)/([\w.-]+)",
    r"colab\.research\.google\.com/github/([\w.-]+)/([\w.-]+)",
    r"([\w-]+)\.github\.io/([\w.-]+)",
]


def mentioned(text):
    """(owner, name) of each address in the text that is meant to be this project's."""
    for place in PLACES:
        for owner, name in re.findall(place, text):
            if re.search("sophia[-_.]?optax", f"{owner}/{name}", re.IGNORECASE):
                yield owner, name.removesuffix(".git").rstrip(".")


def texts():
    """Path and text of each file that git does not ignore; git itself may be absent."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    for folder, folders, files in os.walk(ROOT):
        inside = Path(folder).relative_to(ROOT)
        folders[:] = [
            name
            for name in folders
            if name != ".git"
            and not any(fnmatch.fnmatch(name, each) for each in ignored)
            and (inside / name).as_posix() not in ignored
        ]
        for path in (Path(folder) / name for name in files):
            try:
                yield path.relative_to(ROOT).as_posix(), path.read_text()
            except UnicodeDecodeError:
                continue  # a picture


def test_every_address_is_that_of_pyproject():
    found = {path: set(mentioned(text)) for path, text in texts()}
    del found["tests/test_release.py"]  # wrong ones, below
    assert {path: pairs for path, pairs in found.items() if pairs - {(OWNER, NAME)}} == {}
    named = {path for path, pairs in found.items() if pairs}
    assert named >= {
        ".github/ISSUE_TEMPLATE/config.yml",
        "CHANGELOG.md",
        "CITATION.cff",
        "README.md",
        "notebooks/01_quickstart.ipynb",
        "pyproject.toml",
    }


@pytest.mark.parametrize(
    "text",
    [
        "https://github.com/somebody/sophia_optax/issues",
        "git@github.com:somebody/sophia_optax.git",
        "https://github.com/sophia-optax/sophia-optax",
        "https://somebody.github.io/sophia_optax/",
        "https://raw.githubusercontent.com/sophia_optax/sophia_optax/main/a.png",
        "https://colab.research.google.com/github/somebody/sophia_optax/blob/main/a.ipynb",
    ],
)
def test_a_wrong_address_is_seen(text):
    [found] = mentioned(text)
    assert found != (OWNER, NAME)


def test_the_addresses_of_pyproject_belong_together():
    expected = {
        "Documentation": f"https://{OWNER}.github.io/{NAME}/",
        "Repository": f"https://github.com/{OWNER}/{NAME}",
        "Changelog": f"https://github.com/{OWNER}/{NAME}/blob/main/CHANGELOG.md",
        "Issues": f"https://github.com/{OWNER}/{NAME}/issues",
    }
    assert expected == URLS


def on_pypi(readme):
    """The README with pyproject's substitutions, as it is in the metadata."""
    hook = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for each in hook["substitutions"]:
        readme = re.sub(each["pattern"], each["replacement"], readme)
    return readme


LINKS = re.compile(
    r'\]\(([^)\s]*)|\b(?:href|src|srcset)="([^"]*)"|^\[[^\]]+\]:\s*(\S+)', re.M
)


def test_pypi_shows_no_relative_link():
    text = on_pypi((ROOT / "README.md").read_text())
    links = ["".join(link) for link in LINKS.findall(text)]
    assert links
    assert [link for link in links if not link.startswith("https://")] == []


def test_the_code_of_the_readme_is_as_it_was():
    fence = re.compile(r"^```.*?^```$", re.M | re.S)
    readme = (ROOT / "README.md").read_text()
    assert fence.findall(on_pypi(readme)) == fence.findall(readme)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[a](docs/a.md#b)", "[a]({repository}/blob/main/docs/a.md#b)"),
        ("[a](#b)", "[a]({repository}#b)"),
        ('<a href="a.md">', '<a href="{repository}/blob/main/a.md">'),
        ("![a](docs/a.png)", "![a]({raw}/main/docs/a.png)"),
        ('<img src="a.png" alt="a">', '<img src="{raw}/main/a.png" alt="a">'),
        ('<source srcset="a.png">', '<source srcset="{raw}/main/a.png">'),
        ("[![a](a.svg)](a.md)", "[![a]({raw}/main/a.svg)]({repository}/blob/main/a.md)"),
        (
            "[![a](https://a.b/c.svg)](https://a.b)",
            "[![a](https://a.b/c.svg)](https://a.b)",
        ),
    ],
)
def test_a_relative_link_is_made_whole(written, shown):
    raw = f"https://raw.githubusercontent.com/{OWNER}/{NAME}"
    assert on_pypi(written) == shown.format(repository=URLS["Repository"], raw=raw)


def test_the_version_has_a_section_in_the_changelog():
    release_notes = runpy.run_path(str(ROOT / ".ci" / "release_notes.py"))["release_notes"]
    version = sophia_optax.__version__
    notes = release_notes(f"v{version}")
    assert "\n- " in notes
    assert "[Unreleased]" not in notes
    with pytest.raises(SystemExit, match="The tag is"):
        release_notes("v0.0.0")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    address = URLS["Repository"]
    assert f"[Unreleased]: {address}/compare/v{version}...HEAD\n" in changelog
    assert f"[{version}]: {address}/releases/tag/v{version}\n" in changelog
