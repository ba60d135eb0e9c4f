"""Tests of the project's URLs, its README on PyPI, and the changelog."""

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

# Regular expressions that capture the owner and the name of a repository in a URL.
PATTERNS = [
    r"github\.com[/:]([\w.-]+)/([\w.-]+)",
    r"raw\.githubusercontent\.com/([\w.-]+)/([\w.-]+)",
    r"colab\.research\.google\.com/github/([\w.-]+)/([\w.-]+)",
    r"([\w-]+)\.github\.io/([\w.-]+)",
]


def find_repositories(text):
    """Yield (owner, name) for each URL that refers to this project."""
    for pattern in PATTERNS:
        for owner, name in re.findall(pattern, text):
            if re.search("sophia[-_.]?optax", f"{owner}/{name}", re.IGNORECASE):
                yield owner, name.removesuffix(".git").rstrip(".")


def text_files():
    """Yield the path and content of each text file that `.gitignore` does not exclude."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    for folder, folders, files in os.walk(ROOT):
        relative = Path(folder).relative_to(ROOT)
        folders[:] = [
            name
            for name in folders
            if name != ".git"
            and not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
            and (relative / name).as_posix() not in ignored
        ]
        for path in (Path(folder) / name for name in files):
            try:
                yield path.relative_to(ROOT).as_posix(), path.read_text()
            except UnicodeDecodeError:
                continue  # a binary file, such as an image


def test_project_urls_in_all_files_match_pyproject():
    found = {path: set(find_repositories(text)) for path, text in text_files()}
    assert {path: pairs for path, pairs in found.items() if pairs - {(OWNER, NAME)}} == {}
    assert {path for path, pairs in found.items() if pairs} >= {
        ".github/ISSUE_TEMPLATE/config.yml",
        "CHANGELOG.md",
        "CITATION.cff",
        "README.md",
        "notebooks/01_quickstart.ipynb",
        "pyproject.toml",
    }


def test_pyproject_urls_all_contain_the_same_owner_and_name():
    assert {
        "Documentation": f"https://{OWNER}.github.io/{NAME}/",
        "Repository": f"https://github.com/{OWNER}/{NAME}",
        "Changelog": f"https://github.com/{OWNER}/{NAME}/blob/main/CHANGELOG.md",
        "Issues": f"https://github.com/{OWNER}/{NAME}/issues",
    } == URLS


def make_links_absolute(readme):
    """Make links absolute with the substitutions that pyproject.toml applies for PyPI."""
    hook = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for substitution in hook["substitutions"]:
        readme = re.sub(substitution["pattern"], substitution["replacement"], readme)
    return readme


LINKS = re.compile(
    r'\]\(([^)\s]*)|\b(?:href|src|srcset)="([^"]*)"|^\[[^\]]+\]:\s*(\S+)', re.M
)


def test_pypi_readme_has_only_absolute_links():
    text = make_links_absolute((ROOT / "README.md").read_text())
    links = ["".join(link) for link in LINKS.findall(text)]
    assert links
    assert [link for link in links if not link.startswith("https://")] == []


def test_pypi_readme_substitutions_do_not_change_code_blocks():
    fence = re.compile(r"^```.*?^```$", re.M | re.S)
    readme = (ROOT / "README.md").read_text()
    assert fence.findall(make_links_absolute(readme)) == fence.findall(readme)


@pytest.mark.parametrize(
    ("text", "expected"),
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
def test_pypi_readme_substitutions_make_links_absolute(text, expected):
    raw = f"https://raw.githubusercontent.com/{OWNER}/{NAME}"
    assert make_links_absolute(text) == expected.format(
        repository=URLS["Repository"], raw=raw
    )


def test_changelog_has_a_section_for_the_current_version():
    release_notes = runpy.run_path(str(ROOT / ".ci" / "release_notes.py"))["release_notes"]
    version = sophia_optax.__version__
    notes = release_notes(f"v{version}")
    assert "\n- " in notes
    assert "[Unreleased]" not in notes
    with pytest.raises(SystemExit, match=r"v0\.0\.0"):
        release_notes("v0.0.0")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    address = URLS["Repository"]
    assert f"[Unreleased]: {address}/compare/v{version}...HEAD\n" in changelog
    assert f"[{version}]: {address}/releases/tag/v{version}\n" in changelog
