"""Tests of the documentation site, built with warnings as errors and opened offline."""

import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
BROWSERS = "chromium", "chromium-browser", "google-chrome"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site from a copy of its sources, so parallel builds do not conflict."""
    pytest.importorskip("sphinx", reason='needs `pip install -e ".[docs]"`')
    source = tmp_path_factory.mktemp("site")
    for name in ("docs", "notebooks"):
        ignored = shutil.ignore_patterns("_build")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, source)
    built = source / "html"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", built]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture(scope="module")
def browser(site):
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip("needs an installed Chromium")
    with playwright.sync_playwright() as started:
        # Chromium's sandbox does not work for root, which is the usual user in a container.
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    context.set_default_timeout(20_000)
    yield context.new_page()
    context.close()


def test_site_pages_have_no_errors_network_requests_or_broken_links(site, page):
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(request.url))
    page.on("request", lambda r: r.url.startswith("http") and errors.append(r.url))
    page.on("console", lambda m: m.type == "error" and errors.append(m.text))
    anchors, links = {}, {}
    files = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    assert len(files) > 30
    for file in files:
        page.goto(file.as_uri())
        missing = "[...document.images].filter(i => !i.complete || !i.naturalWidth)"
        errors += page.evaluate(f"{missing}.map(i => i.src)")
        anchors[file] = set(page.evaluate("[...document.all].map(e => e.id)"))
        links[file] = page.evaluate("[...document.links].map(a => a.href)")
        assert not errors, file.name
    for file, hrefs in links.items():
        for href in hrefs:
            if href.startswith("file:"):
                address, anchor = urldefrag(href)
                target = Path(unquote(urlsplit(address).path))
                assert target.exists(), (file.name, href)
                if anchor and target in anchors:
                    assert unquote(anchor) in anchors[target], (file.name, href)


def test_site_pages_fit_the_width_of_a_phone_screen(site, page):
    page.set_viewport_size({"width": 390, "height": 844})
    for file in sorted(site.rglob("*.html")):
        if {"_static", "_modules"}.intersection(file.parts):
            continue
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, file.name


def test_site_typesets_formulas_in_stix_two_math(site, page):
    page.goto((site / "estimators.html").as_uri())
    assert page.evaluate("document.querySelectorAll('math').length") > 20
    fonts = "[...document.fonts].map(font => font.family + ' ' + font.status)"
    assert "STIX Two Math loaded" in [f.replace('"', "") for f in page.evaluate(fonts)]
