"""The tests' own browser tells what a page complains of and what it reaches for."""

from pathlib import Path

import browser

PAGE = """<!doctype html><link rel="icon" href="data:,"><p>page</p><script>
console.error("a complaint");
fetch("here.txt").then((answer) => answer.text()).then((text) => { document.querySelector("p").textContent = text; });
fetch("https://example.com/beacon").catch(() => 0);
throw new Error("thrown");
</script>"""


def test_tells_complaints_and_requests(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text(PAGE)
    (site / "here.txt").write_text("fetched")
    with browser.serve(site) as url, browser.chromium(tmp_path / "profile") as opened:
        with opened.visit(url) as visit:
            visit.page.get_by_text("fetched").wait_for()
            gl = visit.page.evaluate("document.createElement('canvas').getContext('webgl2') !== null")
        assert gl
        assert visit.outside == ["https://example.com/beacon"]
        assert any("a complaint" in error for error in visit.errors)
        assert any("thrown" in error for error in visit.errors)
        with opened.visit((site / "here.txt").as_uri()) as visit:
            pass
        browser.check_clean(visit)
