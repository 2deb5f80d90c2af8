"""The report in a real browser: it shows, it sorts, and nothing of a text can run."""

import json
import math

import pytest
from browser import CONTRAST, Opened, cells, needs_chromium, value
from synthetic_run import HOSTILE, synthetic_sample, write_synthetic_run

from kleash.report.html import write_report
from kleash.report.svg_chart import format_number
from kleash.report.token_heatmap import KL_LEVELS
from kleash.storage.events import new_event
from kleash.storage.run_directory import RunWriter, read_run
from kleash.storage.samples import Likely, Sample


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    hostile = tuple(synthetic_sample(text, step=61, seed=n) for n, text in enumerate(HOSTILE))
    path = write_synthetic_run(folder / "leashed", steps=60, extra_samples=hostile)
    return write_report([path])[0]


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
    with RunWriter.create(folder, settings=config, meta=meta) as run:
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
    twin = json.loads(report.with_suffix(".json").read_text())
    samples, words = twin["samples"], twin["words"]
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
        ours, theirs = (first[key][2] for key in ("policy_top", "reference_top"))
        said = [(words[n], p) for pair in zip(ours[0], theirs[0], strict=True)
                for n, p in zip(pair, (ours[1], theirs[1]), strict=True)]  # fmt: skip
        shown = tip.locator(".tops td").all_inner_texts()
        assert [text.rsplit(" ", 2)[0].replace("␣", " ") for text in shown] == [w for w, _ in said]
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


@pytest.mark.browser
@needs_chromium
def test_a_token_without_likely_words_says_what_it_has(browser, tmp_path):
    likely = [None, Likely(["<b>a</b>"], [1.0])]
    sample = Sample(1, "worst", "policy", "p", "ab", 0.0, 1.0, ["a", "b"], token_kl=[0.1, 0.9],
                    policy_top=likely, reference_top=likely)  # fmt: skip
    path = write_synthetic_run(tmp_path / "run", steps=2, responses=0, extra_samples=(sample,))
    with Opened(browser, write_report([path])[0]) as page:
        page.locator("#samples button.open").click()
        page.locator("#samples .detail .t").nth(0).focus()
        assert "0.100 nats" in page.locator("#tip").inner_text()
        assert page.locator("#tip .tops").count() == 0
        page.keyboard.press("ArrowRight")
        said = page.locator("#tip .tops td").all_inner_texts()
        assert said == ["<b>a</b> 100 %", "<b>a</b> 100 %"]


@pytest.fixture
def eventful(tmp_path):
    events = (
        new_event(20, "reanchored", "the leash is tied to the policy of step 20"),
        new_event(31, "refused", HOSTILE[2] + " is too far"),
        new_event(31, "rolled_back", "from step 31 back to step 30"),
        new_event(70, "stopped", HOSTILE[3]),
    )
    path = write_synthetic_run(tmp_path / "run", steps=60, events=events)
    return write_report([path])[0]


@pytest.mark.browser
@needs_chromium
def test_events_are_seen_read_and_listed(browser, eventful):
    with Opened(browser, eventful) as page:
        svg, tip = page.locator("svg[data-chart='0']"), page.locator("#tip")
        assert svg.locator(".mark").count() == 4
        legend = page.locator("figure").first.locator(".legend").inner_text()
        assert all(f in legend for f in ("anchor moved", "refused", "rolled back", "stopped"))
        svg.focus()
        page.keyboard.press("End")
        assert tip.locator(".head").inner_text() == "step 70"
        assert "stopped: pay U+202E001" in tip.inner_text()
        assert "nats" not in tip.inner_text()
        page.keyboard.press("ArrowLeft")
        assert tip.locator(".head").inner_text() == "step 60" and "±" in tip.inner_text()
        for _ in range(29):
            page.keyboard.press("ArrowLeft")
        assert "refused: " + HOSTILE[2] in tip.inner_text()
        assert "rolled back: from step 31" in tip.inner_text()
        rows = page.locator("#events tbody tr")
        assert rows.locator(".num").all_inner_texts() == ["20", "31", "31", "70"]
        assert rows.nth(1).locator(".sentence").inner_text() == HOSTILE[2] + " is too far"
        assert page.locator("img").count() == 0
        assert "stopped at 70" in svg.get_attribute("aria-label")


@pytest.mark.browser
@needs_chromium
def test_events_fit_a_phone(browser, eventful):
    with Opened(browser, eventful, viewport={"width": 390, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        width = page.locator("#events .sentence").first.bounding_box()["width"]
        assert width > 200
