"""The page in a real browser: a phone's width and a desk's, light and dark, its scripts forbidden.

Each page is put into frames of the widths to try (a window has a least width), sandboxed so that
nothing in it runs; a script around them measures and writes what it found as JSON.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess

import pytest

from alignpro.report.html import render_report
from made_up_report import full_metrics, full_report, typed

REQUIRED = "ALIGNPRO_REQUIRE_BROWSER"  # set where a missing browser is a failure and no skip
PHONE, DESK = 390, 1280  # px
SECTIONS = ["arms", "judge", "training", "headroom", "bound", "samples", "costs", "configuration"]
SCHEMES = {"dark": 0, "light": 1}  # blink's preferredColorScheme

MEASURE = r"""
const parse = c => c.match(/[\d.]+/g).map(Number);
const light = c => parse(c).slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
function backOf(view, node) {  // the first colour behind it that is not transparent
  for (; node; node = node.parentElement) {
    const colour = view.getComputedStyle(node).backgroundColor;
    if ((parse(colour)[3] ?? 1) > 0) return colour;
  }
  return "rgb(255, 255, 255)";
}
function measure(frame) {
  const view = frame.contentWindow, page = frame.contentDocument, root = page.documentElement;
  page.querySelectorAll("details").forEach(d => { d.open = true; });
  const found = {
    width: root.clientWidth, needs: root.scrollWidth, back: backOf(view, page.body),
    sections: [...page.querySelectorAll("section")].filter(s => s.offsetHeight > 40).map(s => s.id),
    scrolled: [], outside: [], clipped: [], faint: [], small: [],
    plots: [...page.querySelectorAll("svg")].map(s => Math.round(s.getBoundingClientRect().width)),
    lines: [], columns: 0, text: page.body.innerText,
  };
  for (const node of page.body.querySelectorAll("*")) {
    if (node.closest("svg") && node.tagName !== "svg") continue;
    const style = view.getComputedStyle(node), box = node.getBoundingClientRect();
    const name = node.tagName + "." + (node.className.baseVal ?? node.className)
      + " " + node.textContent.slice(0, 40);
    if (!box.width || !box.height) continue;
    const over = node.scrollWidth > node.clientWidth + 1;
    if (over && ["auto", "scroll"].includes(style.overflowX)) found.scrolled.push(name);
    if (over && ["hidden", "clip"].includes(style.overflowX) && node.tagName !== "svg")
      found.clipped.push(name);
    if (box.right > root.clientWidth + 1 || box.left < -1) found.outside.push(name);
    if (![...node.childNodes].some(c => c.nodeType === 3 && c.textContent.trim())) continue;
    const [a, b] = [light(style.color), light(backOf(view, node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.faint.push(name);
    if (parseFloat(style.fontSize) < 12) found.small.push(name);
  }
  for (const path of page.querySelectorAll("svg path[style*=stroke]")) {
    const colour = view.getComputedStyle(path).stroke;
    if (colour === "none") continue;
    const [a, b] = [light(colour), light(found.back)].sort((x, y) => y - x);
    found.lines.push((a + 0.05) / (b + 0.05));
  }
  const arms = page.querySelector(".columns")?.children ?? [];
  found.columns = new Set([...arms].map(a => Math.round(a.getBoundingClientRect().left))).size;
  return found;
}
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(measure);
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


@pytest.fixture(scope="module")
def chromium():
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        path = shutil.which(name)
        if path is not None:
            return path
    message = "no Chromium on PATH: apt-get install chromium"
    if os.environ.get(REQUIRED):
        pytest.fail(f"{message} ({REQUIRED} is set)")
    pytest.skip(message)


def open_page(chromium, page, folder, scheme):
    """What a browser finds in the page at both widths: ([phone, desk], its console's lines)."""
    frames = "".join(
        f'<iframe sandbox="allow-same-origin" srcdoc="{html.escape(page)}" '
        f'style="border:0;width:{width}px;height:900px"></iframe>'
        for width in (PHONE, DESK)
    )
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<pre id="found"></pre><script>{MEASURE}</script>{frames}',
        encoding="utf-8",
    )
    command = [
        chromium,
        "--headless",
        "--no-sandbox",  # the system's one does not run as root; nothing foreign is opened
        "--disable-gpu",
        "--no-first-run",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        "--window-size=1400,1000",
        "--enable-logging=stderr",
        "--dump-dom",
        wrapper.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    written = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, re.DOTALL)
    assert written and written[1], result.stderr[-2000:]
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(written[1])), console


@pytest.fixture(scope="module")
def page():
    return render_report(typed(full_report()), full_metrics())


@pytest.fixture(scope="module", params=["light", "dark"])
def opened(request, chromium, page, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"browser-{request.param}")
    return request.param, *open_page(chromium, page, folder, request.param)


def test_the_page_as_it_is_seen(opened):
    scheme, frames, console = opened
    assert console == []
    for frame, width in zip(frames, (PHONE, DESK), strict=True):
        # A scroll bar may take some of it.
        assert width - 20 <= frame["width"] <= width
        assert frame["needs"] <= frame["width"], frame["outside"]
        assert frame["outside"] == []
        assert frame["scrolled"] == []
        assert frame["clipped"] == []
        assert frame["faint"] == []
        assert frame["small"] == []
        assert frame["sections"] == SECTIONS
        assert len(frame["plots"]) == 12 and min(frame["plots"]) >= 300
        # What is drawn over text's colour is read beside it; 3 is WCAG's line for graphics. The
        # frame of the axes is meant to be fainter.
        assert min(frame["lines"]) > 1.5
        assert sum(ratio >= 3 for ratio in frame["lines"]) > len(frame["lines"]) / 2
        assert "The static instruction wins" in frame["text"]
        assert "<script>alert('x')</script>" in frame["text"]
    phone, desk = frames
    assert phone["columns"] == 1 and desk["columns"] >= 3
    dark = {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 28)"}[scheme]
    assert phone["back"] == desk["back"] == dark


def test_what_the_browser_would_catch(chromium, page, tmp_path):
    """The checks above can fail: a page with their faults shows every one of them."""
    faults = (
        "<script>1</script><section id='extra'>.</section>"
        "<p style='width:1500px;max-width:none;color:#999;background:#aaa;font-size:9px'>"
        "wide, faint</p>"
        "<p style='width:50px;overflow:hidden;white-space:nowrap'>longer than its box is</p>"
        "<p style='width:50px;overflow:auto;white-space:nowrap'>longer than its box is</p>"
    )
    bad = page.replace("<header>", f"<header>{faults}")
    frames, console = open_page(chromium, bad, tmp_path, "light")
    assert any("Blocked script execution" in line for line in console)
    for frame in frames:
        assert frame["needs"] > frame["width"]
        for check in ("outside", "faint", "small"):
            assert any("wide, faint" in name for name in frame[check]), check
        for check in ("clipped", "scrolled"):
            assert any("longer than" in name for name in frame[check]), check
