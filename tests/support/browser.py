"""A page in the system's Chromium, with everything it said and asked for."""

from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium on this machine")


class Opened:
    """A page with everything it said and asked for."""

    def __init__(self, browser, file, **context):
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.said, self.asked, self.refused = [], [], {}
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("requestfailed", lambda r: self.refused.update({r.url: r.failure}))
        self.page.goto(file.as_uri())
        self.file = file

    def __enter__(self):
        return self.page

    def __exit__(self, kind, error, traceback):
        self.context.close()
        if kind is None:
            assert self.said == [] and set(self.asked) == {self.file.as_uri()}


def cells(page, column):
    return page.locator(f"#samples tr.row:visible td:nth-child({column})").all_inner_texts()


def value(text):
    return float(text.replace("−", "-"))


CONTRAST = """selectors => selectors.flatMap(selector => {
    const node = document.querySelector(selector);
    if (!node) return [[selector, 0]];
    const parse = c => c.match(/[\\d.]+/g).map(Number);
    let under = node, back;
    for (;;) {
        back = parse(getComputedStyle(under).backgroundColor);
        if (back.length < 4 || back[3] > 0) break;
        under = under.parentElement;
    }
    const light = c => c.slice(0, 3).map(v => v / 255)
        .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(back)];
    return [[selector, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)]];
})"""
