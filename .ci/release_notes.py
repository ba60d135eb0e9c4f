"""Print a release's section of the changelog: `python .ci/release_notes.py v0.1.0`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def release_notes(tag):
    """Return the changelog section of a tag. Exit unless it is the current version."""
    package = (ROOT / "sophia_optax" / "__init__.py").read_text()
    [version] = re.findall(r'^__version__ = "(.*)"$', package, re.MULTILINE)
    if tag != f"v{version}":
        sys.exit(f"The tag is {tag}, and sophia_optax/__init__.py has version {version}.")
    # A section ends where the next section or the list of version links starts.
    section = re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.+?)(?=^## |^\[.+\]: |\Z)",
        (ROOT / "CHANGELOG.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    if not section:
        sys.exit(f"CHANGELOG.md has no dated section of {version}.")
    return section[1].strip()


if __name__ == "__main__":
    print(release_notes(sys.argv[1]))
