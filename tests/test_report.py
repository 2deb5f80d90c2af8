"""The report: one page, no network, that shows what the run directory says and only shows it."""

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import sync_playwright
from synthetic_run import HOSTILE, synthetic_sample, write_synthetic_run

from kleash.errors import RunError
from kleash.report import charts
from kleash.report.charts import Band, Chart, Point, Series, draw, format_number, labelled_ticks
from kleash.report.curves import chart_groups, responses_per_step
from kleash.report.glossary import GLOSSARY, define, markdown
from kleash.report.heatmap import KL_LEVELS, MAX_RESPONSES, level, page_samples, spaced
from kleash.report.page import write_report
from kleash.runs import RunWriter, Sample, read_run

CHROMIUM = Path("/usr/bin/chromium")
needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium on this machine")
ROOT = Path(__file__).parents[1]


# ---- glossary -----------------------------------------------------------------------------------


def test_the_documentation_is_the_table():
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == markdown()


def test_every_key_is_defined_once_and_no_kl_is_bare():
    keys = [metric.key for metric in GLOSSARY]
    assert len(set(keys)) == len(keys)
    assert not [key for key in keys if re.search(r"(^|/)kl$", key) and key != "loss/kl"]
    for metric in GLOSSARY:
        assert all(vars(metric).values()), metric.key


def test_every_key_of_a_run_is_defined(tmp_path):
    run = read_run(write_synthetic_run(tmp_path / "run", steps=3))
    assert [key for line in run.metrics for key in line if define(key) is None] == []
    assert define("made/up") is None and define("heldout/made_up") is None


def test_every_literal_key_of_the_source_is_defined():
    pattern = r'"((?:objective|policy|loss|value|rollout|reward|optim|time|heldout)/[a-z0-9_]+)"'
    sources = (ROOT / "src" / "kleash").rglob("*.py")
    keys = {key for file in sources for key in re.findall(pattern, file.read_text("utf-8"))}
    assert len(keys) > 20 and sorted(key for key in keys if define(key) is None) == []


# ---- charts -------------------------------------------------------------------------------------


def chart(*points, **more):
    series = Series("s", [Point(float(x), float(y)) for x, y in points])
    return Chart(title="t", unit="nats", sample="", key="", series=[series], **more)


def places(path):
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[-\d.e]+ [-\d.e]+", path)]


def test_a_line_goes_from_corner_to_corner():
    drawn = draw(chart((0, 0), (10, 5), include=(0.0,)))
    (x0, y0), (x1, y1) = places(drawn.series[0].path)
    assert (x0, y0) == (charts.LEFT, charts.HEIGHT - charts.BOTTOM)
    assert x1 == charts.WIDTH - charts.RIGHT
    assert y1 == pytest.approx(charts.TOP + 0.06 / 1.06 * (y0 - charts.TOP), abs=0.1)


def test_what_is_not_finite_breaks_the_line_and_is_marked():
    points = [(0, 1), (1, 2), (2, math.nan), (3, 2), (4, math.inf), (5, 1)]
    (series,) = draw(chart(*points)).series
    assert series.path.count("M") == 1 and len(places(series.path)) == 2
    assert len(series.dots) == 2 and len(series.lost) == 2
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(chart((0, math.nan)))


def test_errors_and_bands_fit_in_the_drawing():
    line = Series("s", [Point(0.0, 1.0, 0.5), Point(1.0, 2.0, 3.0), Point(2.0, 2.0, math.nan)])
    band = Band("b", [Point(0.0, 9.0), Point(2.0, 9.0)], 0.2)
    drawn = draw(Chart("t", "", "", "", [line], [band]))
    everything = places(drawn.series[0].error_path) + places(drawn.bands[0].area)
    assert len(places(drawn.series[0].error_path)) == 4
    assert all(charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM for _, y in everything)


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-4, 1e6))
def test_ticks_are_round_inside_and_told_apart(low, width):
    high = low + width
    marks = labelled_ticks(low, high)
    assert 2 <= len(marks) <= 11
    assert all(low - 1e-6 * width <= at <= high + 1e-6 * width for at, _ in marks)
    if width > 1e-2:
        assert len({label for _, label in marks}) == len(marks)


@given(st.floats())
def test_numbers_are_readable(value):
    text = format_number(value)
    assert "-" not in text.replace("e-", "e") and len(text) <= 12
    if 1e-3 < abs(value) < 1e6:
        back = float(text.replace("−", "-").replace(",", ""))
        assert back == pytest.approx(value, rel=6e-3, abs=0.5 if abs(value) >= 1000 else 0)


@pytest.mark.parametrize(("kl", "expected"), [(0, 0), (0.00999, 0), (0.01, 1), (10, 7), (1e9, 7)])
def test_levels(kl, expected):
    assert level(float(kl)) == expected


@given(
    words=st.lists(st.text("ab", min_size=1), max_size=6),
    gaps=st.lists(st.sampled_from([" ", "\n", "  "]), min_size=6, max_size=6),
)
def test_tokens_get_their_spaces_back(words, gaps):
    response = "".join(gap + word for gap, word in zip(gaps, words, strict=False))
    assert "".join(spaced([*words, "<eos>"], response)) == response + "<eos>"
    whole = [response[:3], response[3:]] if len(response) > 3 else [response]
    assert spaced(whole, response) == whole


def test_charts_follow_the_run(tmp_path):
    run = read_run(write_synthetic_run(tmp_path / "run", steps=20))
    groups = dict(chart_groups([run], ["run"]))
    kl, beta, frontier = groups["The leash"]
    assert (kl.unit, kl.sample) == ("nats per response", "n = 64 responses a point")
    assert [s.name for s in kl.series] == ["exact ± s.e.", "sampled k1"]
    assert [p.y for p in kl.series[0].points] == [m["objective/kl_ref"] for m in run.metrics]
    assert kl.series[0].points[3].error == run.metrics[3]["objective/kl_ref_se"]
    assert kl.bands[0].points[0].y == 5.0 and beta.sample == ""
    roots = [math.sqrt(max(m["objective/kl_ref"], 0)) for m in run.metrics]
    assert [p.x for p in frontier.series[0].points] == roots
    titles = [one.title for one in groups["What it earned"]]
    assert "Gold score, held-out prompts" in titles and "Reward: polite" in titles
    gold = groups["What it earned"][titles.index("Gold score, held-out prompts")]
    assert gold.sample == "n = 128 responses a point"


def test_runs_are_overlaid(tmp_path):
    runs = [read_run(write_synthetic_run(tmp_path / n, steps=9, target=t)) for n, t in
            (("a", 5.0), ("b", 2.0), ("c", None))]  # fmt: skip
    kl = dict(chart_groups(runs, list("abc")))["The leash"][0]
    assert [s.name for s in kl.series if s.style == "line"] == ["a", "b", "c"]
    assert len(kl.bands) == 2


def test_a_bare_run_still_has_charts(tmp_path):
    with RunWriter.create(tmp_path / "run", config={}, meta={}) as run:
        run.append_metrics({"step": 0, "heldout/gold": 1.0})
        run.append_metrics({"step": 1, "objective/kl_ref": 0.0, "objective/scores": math.nan})
        run.append_metrics({"step": 2, "objective/kl_ref": math.inf, "reward/a\ud800<b>": 1.0})
    page, _ = write_report([tmp_path / "run"])
    assert "KL to the reference" in page.read_text("utf-8")


def test_responses_per_step():
    lines = [{"step": 0}, *({"step": k, "episodes": 32 * k} for k in (1, 2, 3, 5))]
    assert responses_per_step(lines) == 32
    assert (
        responses_per_step([*lines, lines[-1]]) == 32 and responses_per_step([{"step": 1}]) is None
    )


def test_a_page_holds_an_equal_share_of_each_run(tmp_path):
    extra = tuple(synthetic_sample(step=step, tokens=2) for step in range(MAX_RESPONSES + 10))
    long = read_run(write_synthetic_run(tmp_path / "a", steps=1, responses=0, extra_samples=extra))
    short = read_run(write_synthetic_run(tmp_path / "b", steps=1, responses=2))
    shown, left_out = page_samples([long, short])
    assert len(shown) == MAX_RESPONSES // 2 + 4 and left_out == MAX_RESPONSES // 2 + 10
    assert shown[0]["step"] == MAX_RESPONSES + 9


# ---- files --------------------------------------------------------------------------------------


def test_the_twin_is_strict_json_with_the_same_numbers(tmp_path):
    path = write_synthetic_run(tmp_path / "run", steps=5)
    page, twin = write_report([path])
    assert (page, twin) == (path / "report.html", path / "report.json")
    report = json.loads(twin.read_text(), parse_constant=pytest.fail)
    assert report["schema"] == "kleash.report/1"
    (run,) = report["runs"]
    assert run["metrics"] == list(read_run(path).metrics)
    assert run["summary"]["kl"] == run["metrics"][-1]["objective/kl_ref"]
    assert run["summary"]["score_first"] == run["metrics"][0]["objective/scores"]
    assert (run["status"], run["samples"]) == ("finished", len(report["samples"]))


def test_where_a_comparison_goes(tmp_path):
    a = write_synthetic_run(tmp_path / "x" / "run", steps=3)
    b = write_synthetic_run(tmp_path / "y" / "run", steps=3)
    page, twin = write_report([a, b])
    assert page.parent == a.parent
    assert [r["name"] for r in json.loads(twin.read_text())["runs"]] == ["x/run", "y/run"]
    page, twin = write_report([a, a], into=tmp_path)
    assert page.parent == tmp_path
    assert [r["name"] for r in json.loads(twin.read_text())["runs"]] == [
        "x/run (1)",
        "x/run (2)",
    ]


def test_what_cannot_be_reported_is_said(tmp_path):
    with pytest.raises(RunError, match="at least one"):
        write_report([])
    RunWriter.create(tmp_path / "run", config={}, meta={})
    with pytest.raises(RunError, match="no step to report"):
        write_report([tmp_path / "run"])
    path = write_synthetic_run(tmp_path / "other", steps=2)
    with pytest.raises(RunError, match="cannot write"):
        write_report([path], into=tmp_path / "nowhere")


def test_what_went_wrong_is_on_the_page(tmp_path):
    path = write_synthetic_run(tmp_path / "run", steps=9, gold_falls=True)
    file = path / "samples.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    meta = json.loads((path / "run.json").read_text())
    meta |= {"status": "failed", "message": "lost <b>power</b>"}
    (path / "run.json").write_text(json.dumps(meta))
    text = write_report([path])[0].read_text("utf-8")
    assert "breaks off and was left out" in text and "Evidence of over-optimisation" in text
    assert "lost &lt;b&gt;power&lt;/b&gt;" in text and "lost <b>" not in text


# ---- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


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


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    hostile = tuple(synthetic_sample(text, step=61, seed=n) for n, text in enumerate(HOSTILE))
    path = write_synthetic_run(folder / "leashed", steps=60, extra_samples=hostile)
    return write_report([path])[0]


def cells(page, column):
    return page.locator(f"#samples tr.row:visible td:nth-child({column})").all_inner_texts()


def value(text):
    return float(text.replace("−", "-"))


def test_the_data_cannot_leave_its_element(report):
    data = report.read_text("utf-8").split('id="data">')[1].split("</script>")[0]
    assert not set(data) & set("<>&\u2028\u2029") and data.isascii()
    shown = [sample["prompt"] for sample in json.loads(data)["samples"]]
    assert shown[: len(HOSTILE)] == list(HOSTILE)


@pytest.mark.browser
@needs_chromium
def test_hostile_text_is_text(browser, report):
    with Opened(browser, report) as page:
        page.locator("#search").fill("owned")
        assert "2 of" in page.locator("#count").inner_text()
        page.locator("#search").fill("")
        rows = page.locator("#samples tr.row")
        for number in range(len(HOSTILE)):
            rows.nth(number).locator("button.open").press("Enter")
        details = page.locator("#samples tr.detail")
        assert details.count() == len(HOSTILE)
        shown = [details.nth(n).locator(".prompt").text_content() for n in range(len(HOSTILE))]
        assert shown[:3] == list(HOSTILE[:3])
        assert shown[3] == "pay U+202E001U+202C now U+2066isolatedU+2069 U+200F"
        assert shown[4] == "aU+0000bU+0007cU+001B[31m"
        assert shown[5] == "lone U+D800 and U+DFFF surrogates"
        assert shown[6] == "lineU+2028separatorU+2029 and U+FEFF mark"
        assert shown[7:9] == list(HOSTILE[7:9])
        assert shown[9] == "</script <!-- <script <b>U+202EboldU+202C</b>"
        tokens = [details.nth(n).locator(".t").nth(1).text_content() for n in range(len(HOSTILE))]
        assert tokens == shown
        assert page.title() == "leashed · kleash report"
        assert page.locator("img, iframe, object, embed").count() == 0
        assert page.locator("script").count() == 2 and page.locator("style").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.browser
@needs_chromium
def test_hostile_names_are_text(browser, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    folder = tmp_path / name
    config = {"a": "</pre><script>alert(2)</script>"}
    meta = {"seed": "<b>1</b>", "started": "<script>alert(3)</script>", "argv": ["\ud800<i>"]}
    with RunWriter.create(folder, config=config, meta=meta) as run:
        for step in (1, 2):
            run.append_metrics({"step": step, "objective/scores": 1.0, "reward/<script>x": 1.0,
                                "reward/</script>\u202e": 2.0})  # fmt: skip
        run.append_samples([Sample(1, "worst", "policy", "p", "r", None, None)])
    with Opened(browser, write_report([folder])[0]) as page:
        assert page.locator("h1").inner_text() == name
        assert "</script>[U+202E]" in page.locator("#what-it-earned").inner_text()
        assert "<script>alert(2)</script>" in page.locator("#about pre").nth(0).text_content()
        assert page.locator("img").count() == 0 and page.locator("b:text('1')").count() == 0


@pytest.mark.browser
@needs_chromium
def test_the_policy_forbids_what_was_not_written_with_the_page(browser, report):
    opened = Opened(browser, report)
    opened.page.evaluate(
        """() => {
            const script = document.createElement('script');
            script.textContent = 'document.title = "owned"';
            document.body.append(script);
            const image = new Image(); image.src = 'https://example.com/x.png';
            fetch('https://example.com/').catch(() => {});
        }"""
    )
    opened.page.wait_for_timeout(200)
    assert opened.page.title() == "leashed · kleash report"
    assert set(opened.refused) == set(opened.asked) - {report.as_uri()}
    assert set(opened.refused.values()) <= {"csp"}
    assert len(opened.said) >= 3 and all("Content Security Policy" in s for s in opened.said[:3])
    opened.context.close()


@pytest.mark.browser
@needs_chromium
def test_sort_and_search(browser, report):
    with Opened(browser, report) as page:
        total = int(page.locator("#count").inner_text().split()[0])
        assert page.locator("#samples tr.row:visible").count() == 40
        page.locator("#more-rows").click()
        assert page.locator("#samples tr.row:visible").count() == total
        header = page.locator("#samples th", has_text="KL")
        header.locator("button").click()
        down = [value(text) for text in cells(page, 4)]
        assert down == sorted(down, reverse=True) and len(set(down)) > 10
        assert header.get_attribute("aria-sort") == "descending"
        header.locator("button").press("Enter")
        up = [value(text) for text in cells(page, 4)]
        assert up == sorted(up) and header.get_attribute("aria-sort") == "ascending"
        page.locator("#who").select_option("reference")
        assert set(cells(page, 3)) == {"reference"}
        page.locator("#kind").select_option("heldout")
        page.locator("#search").fill("QUESTION 0:")
        assert set(cells(page, 2)) == {"held out"}
        assert all("question 0:" in text for text in cells(page, 7))
        page.locator("#search").fill("no such words")
        assert page.locator("#count").inner_text() == f"0 of {total} responses"


@pytest.mark.browser
@needs_chromium
def test_sorting_puts_missing_values_last(browser, tmp_path):
    scores = [1.0, None, math.nan, math.inf, -2.0]
    path = write_synthetic_run(
        tmp_path / "run", steps=1, responses=0,
        extra_samples=tuple(Sample(1, "worst", "policy", "p", "r", s, 1.0) for s in scores),
    )  # fmt: skip
    with Opened(browser, write_report([path])[0]) as page:
        button = page.locator("#samples th", has_text="Score").locator("button")
        button.click()
        assert cells(page, 5)[:3] == ["∞", "1.00", "−2.00"]
        button.click()
        assert cells(page, 5)[:3] == ["−2.00", "1.00", "∞"]


@pytest.mark.browser
@needs_chromium
def test_tokens_say_what_both_models_said(browser, report):
    samples = json.loads(report.with_suffix(".json").read_text())["samples"]
    first = next(s for s in samples if s["prompt"].startswith("question"))
    reference = next(s for s in samples if s["prompt"] == first["prompt"] and s["who"] != "policy")
    with Opened(browser, report) as page:
        pair = page.locator(".pair").first
        assert pair.locator("header b").all_inner_texts() == ["Reference", "Policy"]
        heats = pair.locator(".heat")
        assert heats.nth(0).text_content() == "".join(reference["tokens"])
        policy = heats.nth(1).locator(".t")
        policy.nth(2).hover()
        tip = page.locator("#tip")
        assert first["tokens"][2].strip() in tip.locator(".head").inner_text()
        assert format_number(first["token_kl"][2]) + " nats" in tip.inner_text()
        for key in ("logprobs", "ref_logprobs"):
            assert format_number(first[key][2]) in tip.inner_text()
        wanted = [f"h{sum(kl >= bound for bound in KL_LEVELS)}" for kl in first["token_kl"]]
        assert [c.split()[1] for c in policy.evaluate_all("all => all.map(t => t.className)")] == (
            wanted
        )


@pytest.mark.browser
@needs_chromium
def test_keyboard(browser, report):
    with Opened(browser, report) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        tip = page.locator("#tip")
        page.locator(".heat .t").first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert "token 3 of" in tip.inner_text()
        page.keyboard.press("End")
        assert "token 24 of 24" in tip.inner_text()
        page.keyboard.press("Escape")
        assert tip.is_hidden()
        page.locator("svg[data-chart='0']").focus()
        page.keyboard.press("End")
        assert tip.locator(".head").inner_text() == "step 60"
        page.keyboard.press("ArrowLeft")
        assert tip.locator(".head").inner_text() == "step 59" and "±" in tip.inner_text()
        page.locator("a.what").first.focus()
        assert "What the reward model gives" in tip.inner_text()
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash") == "#def-objective-scores"


@pytest.mark.browser
@needs_chromium
def test_charts_say_the_numbers_under_the_pointer(browser, report):
    metrics = read_run(report.parent).metrics
    with Opened(browser, report) as page:
        svg = page.locator("svg[data-chart='0']")
        svg.scroll_into_view_if_needed()
        box = svg.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
        tip = page.locator("#tip")
        step = int(tip.locator(".head").inner_text().removeprefix("step "))
        assert 20 < step < 40
        line = metrics[step - 1]
        assert format_number(line["objective/kl_ref"]) in tip.inner_text()
        assert format_number(line["objective/kl_ref_k1"]) in tip.inner_text()


@pytest.mark.browser
@needs_chromium
def test_light_and_dark(browser, report):
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(251, 250, 248)", "rgb(20, 22, 24)"
    with Opened(browser, report, color_scheme="dark") as page:
        assert page.evaluate(background) == dark
        page.locator("#theme").click()
        assert page.evaluate(background) == light
        page.reload()
        assert page.locator("#theme").inner_text() == "Theme: light"
        page.locator("#theme").click()
        assert page.evaluate(background) == dark
        page.context.pages[0].evaluate("localStorage.clear()")
    with Opened(browser, report, color_scheme="light") as page:
        assert page.evaluate(background) == light


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


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, tmp_path, scheme):
    kl = [0.0, 0.02, 0.05, 0.2, 0.5, 2.0, 5.0, 20.0]
    sample = Sample(1, "worst", "policy", "p", "r", 0.0, sum(kl), list("abcdefgh"), token_kl=kl)
    path = write_synthetic_run(tmp_path / "run", steps=2, responses=0, extra_samples=(sample,))
    with Opened(browser, write_report([path])[0], color_scheme=scheme) as page:
        page.locator("#samples button.open").click()
        selectors = ["body", ".byline", ".tile dt", ".lead", ".what", "nav.contents a",
                     *(f".t.h{n}" for n in range(8))]  # fmt: skip
        low = [(s, ratio) for s, ratio in page.evaluate(CONTRAST, selectors) if ratio < 4.5]
        assert low == []


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("runs", [1, 3])
def test_phone(browser, tmp_path, runs):
    paths = [write_synthetic_run(tmp_path / f"run-{n}", steps=12, seed=n) for n in range(runs)]
    page_file, _ = write_report(paths)
    with Opened(browser, page_file, viewport={"width": 390, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.locator("#samples th", has_text="Score").locator("button").click()
        page.locator("#samples button.open").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.locator("#samples td.text").first.bounding_box()["width"] > 300
        size = page.locator(".grid text").first.evaluate("t => t.getBoundingClientRect().height")
        assert size >= 8


@pytest.mark.browser
@needs_chromium
def test_two_hundred_responses_open(browser, tmp_path):
    path = write_synthetic_run(
        tmp_path / "run", steps=1, responses=0,
        extra_samples=tuple(synthetic_sample(tokens=256, seed=n) for n in range(200)),
    )  # fmt: skip
    with Opened(browser, write_report([path])[0]) as page:
        assert page.locator("#count").inner_text() == "200 of 200 responses"
