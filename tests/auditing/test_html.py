"""The page of an audit, in a real browser: it shows, it sorts, and nothing of a text can run."""

import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CONTRAST, Opened, cells, needs_chromium, value
from synthetic_run import HOSTILE

from kleash.auditing.confidence_intervals import interval
from kleash.auditing.drift_curve import drift_of, write_drift
from kleash.auditing.html import render, write_page
from kleash.auditing.result import (
    Audit,
    AuditedResponse,
    BitsPerByte,
    Gate,
    Measure,
    Part,
    Precision,
    Share,
    Tail,
    TopTokens,
    WorstToken,
)
from kleash.auditing.run_context import CheckpointInRun, Spot
from kleash.models.policy import Identity
from kleash.report.svg_chart import format_number
from kleash.report.token_heatmap import KL_LEVELS

WORDS = ("please", "open", "the", "settings", "page", "and", "choose", "your", "account")


def sample(number: int, tokens: int, *, text: str | None = None, by: str = "policy", kl=None):
    rng = random.Random(number)
    words = [f" {rng.choice(WORDS)}" for _ in range(tokens)]
    if text is not None:
        words[1] = text
    kl = kl or [rng.expovariate(5) for _ in words]

    def numbers(low: float, high: float) -> list[float]:
        return [rng.uniform(low, high) for _ in words]

    top = [
        TopTokens([rng.randrange(40) for _ in range(5)], [0.4, 0.2, 0.1, 0.05, 0.01]) for _ in words
    ]
    return AuditedResponse(
        number=number,
        kind="worst" if number % 2 else "random",
        by=by,
        group=None,
        prompt=text if text is not None else f"question {number}: what now?",
        response="".join(words),
        kl=sum(kl),
        tokens=words,
        token_kl=kl,
        reverse_kl=numbers(0, 1),
        logprobs=numbers(-3, 0),
        ref_logprobs=numbers(-3, 0),
        entropy=numbers(0, 3),
        ref_entropy=numbers(0, 3),
        policy_top=top,
        reference_top=list(reversed(top)),
    )


def measure(mean: float) -> Measure:
    return Measure(
        interval(mean, mean / 20, n=200, clusters=100),
        interval(40 * mean, mean, n=200, clusters=100),
    )


def part(samples: list[AuditedResponse], *, by: str = "policy", name: str = "word") -> Part:
    head = "reverse_kl" if by == "reference" else "kl"
    kl = interval(0.1, 0.01, n=200, clusters=100)
    shares = [Share(f"{name} {n}", float(n), kl, 50, 0.1) for n in range(10)]
    names = (
        ("kl", "reverse_kl", "k1", "k3") if by != "text" else ("kl", "nll", "ref_nll", "same_top")
    )
    token = WorstToken(
        3, 7, name, f"before {name}", f"{name} after", 4.5, -0.1, -5.0,
        TopTokens([1, 2], [0.9, 0.1]), TopTokens([2, 3], [0.6, 0.2]),
    )  # fmt: skip
    one = interval(5.0, 0.1, n=200, clusters=100)
    return Part(
        by=by, responses=200, prompts=100, tokens=8000, headline=head,
        measures={key: measure(0.1) for key in names},
        perplexity={"policy": one, "reference": one} if by == "text" else {},
        percentiles={"50": 0.01, "90": 0.1, "99": 1.0, "max": 9.0},
        histogram=[(-4.0, 3000), (-3.0, 4000), (-2.0, 1000)],
        positions=shares, classes=shares[:5], groups=shares,
        tail=Tail(1.5, 0.3, True), floor=1e-8, verdict="resolved",
        samples=samples, worst_tokens=[token], gained=[(1, 0.01)], lost=[(2, 0.02)], mass_tokens=99,
    )  # fmt: skip


def made(samples: list[AuditedResponse], *, name: str = "models/tuned", **more) -> Audit:
    parts = more.pop("parts", None) or [part(samples, name=name)]
    return Audit(
        policy=Identity(name, "loaded", "float32", "9f" * 32),
        reference=Identity(f"{name}-base", "loaded", "float32", "1c" * 32),
        settings={"source": "prompts", "file": f"{name}.jsonl", "seed": 0},
        parts=parts, complete=True, notes=[f"a note on {name}"],
        precision=Precision(0.01, "token", False, 0.02, 900), gate=Gate(0.05, "token", "above", 3),
        token_texts={str(n): f" w{n}" if n else name for n in range(40)}, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("page") / "audit.html"
    policy = [sample(n, 24) for n in range(60)]
    reference = [sample(n, 24, by="reference") for n in range(60)]
    parts = [part(policy), part(reference, by="reference")]
    write_page(made([], parts=parts), file)
    return file


@pytest.mark.browser
@needs_chromium
def test_two_hundred_long_responses_open_in_two_seconds(browser, tmp_path) -> None:
    file = tmp_path / "audit.html"
    write_page(made([sample(n, 256) for n in range(200)]), file)
    began = time.perf_counter()
    with Opened(browser, file) as page:
        assert page.locator("#count").inner_text() == "200 of 200 responses"
        took = page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart")
    # Of the page itself; starting a context of the browser is not its doing.
    assert 0 < took <= 2000, took
    assert time.perf_counter() - began < 60


@pytest.mark.browser
@needs_chromium
def test_hostile_text_is_text(browser, tmp_path) -> None:
    file = tmp_path / "audit.html"
    write_page(made([sample(n, 8, text=text) for n, text in enumerate(HOSTILE)]), file)
    with Opened(browser, file) as page:
        rows = page.locator("#samples tr.row")
        assert rows.count() == len(HOSTILE)
        for number in range(len(HOSTILE)):
            rows.nth(number).locator("button.open").press("Enter")
        details = page.locator("#samples tr.detail")
        shown = [details.nth(n).locator(".prompt").text_content() for n in range(len(HOSTILE))]
        assert shown[:3] == list(HOSTILE[:3]) and shown[7:9] == list(HOSTILE[7:9])
        assert shown[3] == "pay U+202E001U+202C now U+2066isolatedU+2069 U+200F"
        assert shown[4] == "aU+0000bU+0007cU+001B[31m"
        assert shown[5] == "lone U+D800 and U+DFFF surrogates"
        for number, text in enumerate(shown):
            token = details.nth(number).locator(".t").nth(1)
            assert token.text_content() == text
            token.focus()
            assert page.locator("#tip .tops td").count() == 10
        assert page.title() == "models/tuned · kleash audit"
        assert page.locator("img, iframe, object, embed").count() == 0
        assert page.locator("script").count() == 2 and page.locator("style").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("name", [*HOSTILE[:8], HOSTILE[9]])
def test_hostile_names_are_text(browser, tmp_path, name: str) -> None:
    """Every string of an audit: paths, files, notes, classes, groups, words, contexts."""
    file = tmp_path / "audit.html"
    write_page(made([sample(0, 4)], name=name), file)
    with Opened(browser, file) as page:
        assert page.locator("img, iframe, object, embed").count() == 0
        assert page.locator("script").count() == 2 and page.locator("style").count() == 1
        assert page.title().endswith("· kleash audit")
        assert page.locator("body").evaluate("b => getComputedStyle(b).display") == "block"
    data = file.read_text("utf-8").split('id="data">')[1].split("</script>")[0]
    assert not set(data) & set("<>&\u2028\u2029") and data.isascii()


@pytest.mark.browser
@needs_chromium
def test_sort_and_search(browser, page_file) -> None:
    with Opened(browser, page_file) as page:
        assert page.locator("#samples th").all_inner_texts() == [
            "Kept as", "By", "KL", "Tokens", "Prompt", "Response",
        ]  # fmt: skip
        page.locator("#more-rows").click()
        header = page.locator("#samples th", has_text="KL")
        header.locator("button").click()
        down = [value(text) for text in cells(page, 3)]
        assert down == sorted(down, reverse=True) and len(down) == 120
        header.locator("button").press("Enter")
        assert [value(text) for text in cells(page, 3)] == down[::-1]
        assert header.get_attribute("aria-sort") == "ascending"
        page.locator("#who").select_option("reference")
        page.locator("#kind").select_option("worst")
        page.locator("#search").fill("QUESTION 7:")
        assert (set(cells(page, 1)), set(cells(page, 2))) == ({"worst"}, {"reference"})
        assert all("7:" in text for text in cells(page, 5)) and len(cells(page, 5)) == 6
        assert page.locator("#count").inner_text() == "6 of 120 responses"


@pytest.mark.browser
@needs_chromium
def test_tokens_say_what_each_model_wanted(browser, page_file) -> None:
    first = sample(0, 24)
    with Opened(browser, page_file) as page:
        pair = page.locator(".pair").first
        assert pair.locator("header b").all_inner_texts() == ["Reference", "Policy"]
        tokens = pair.locator(".heat").nth(1).locator(".t")
        tokens.nth(2).hover()
        tip = page.locator("#tip")
        for text in (
            format_number(float(f"{first.token_kl[2]:.4g}")) + " nats",
            format_number(float(f"{first.reverse_kl[2]:.4g}")),
            format_number(float(f"{first.ref_entropy[2]:.4g}")),
            "policy wanted",
            "40.0 %",
            "token 3 of 24",
        ):
            assert text in tip.inner_text(), text
        ours = tip.locator(".tops tr td:first-child").all_inner_texts()
        words = [f" w{n}" if n else "models/tuned" for n in first.policy_top[2].ids]
        assert [text.rsplit(" ", 2)[0] for text in ours] == [w.replace(" ", "␣") for w in words]
        classes = tokens.evaluate_all("all => all.map(t => t.className)")
        levels = [sum(kl >= bound for bound in KL_LEVELS) for kl in first.token_kl]
        assert classes == [f"t h{level}" for level in levels]


@pytest.mark.browser
@needs_chromium
def test_keyboard(browser, page_file) -> None:
    with Opened(browser, page_file) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        tip = page.locator("#tip")
        page.locator(".heat .t").first.focus()
        page.keyboard.press("ArrowRight")
        assert "token 2 of" in tip.inner_text() and "wanted" in tip.inner_text()
        page.keyboard.press("Escape")
        assert tip.is_hidden()
        page.locator("svg[data-chart='0']").focus()
        page.keyboard.press("End")
        assert "position in the response 9" in tip.inner_text() and "±" in tip.inner_text()
        page.locator("a.what").first.focus()
        assert "How far the policy has gone" in tip.inner_text()
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash") == "#def-kl"


@pytest.mark.browser
@needs_chromium
def test_every_question_mark_has_its_answer(browser, page_file) -> None:
    with Opened(browser, page_file) as page:
        marks = page.locator("a.what")
        assert marks.count() >= 8
        for number in range(marks.count()):
            target = marks.nth(number).get_attribute("data-def")
            assert page.locator(f"#{target}").count() == 1, target


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_stand_out(browser, tmp_path, scheme) -> None:
    kl = [0.0, 0.02, 0.05, 0.2, 0.5, 2.0, 5.0, 20.0]
    file = tmp_path / "audit.html"
    write_page(made([sample(1, 8, kl=kl)]), file)
    with Opened(browser, file, color_scheme=scheme) as page:
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(251, 250, 248)", "dark": "rgb(20, 22, 24)"}[scheme]
        page.locator("#samples button.open").click()
        selectors = ["body", ".byline", ".tile dt", ".lead", ".what", ".tokens mark", ".piece",
                     ".headline td", ".pm", *(f".t.h{n}" for n in range(8))]  # fmt: skip
        low = [(s, ratio) for s, ratio in page.evaluate(CONTRAST, selectors) if ratio < 4.5]
        assert low == []
        page.locator("#theme").click()
        assert page.locator("#theme").inner_text() == "Theme: light"


@pytest.mark.browser
@needs_chromium
def test_phone(browser, page_file) -> None:
    with Opened(browser, page_file, viewport={"width": 390, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.locator("#samples button.open").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.locator(".tokens td.context").first.bounding_box()["width"] > 300


@pytest.mark.browser
@needs_chromium
def test_pages_of_texts_of_bytes_and_of_drift(browser, tmp_path) -> None:
    file = tmp_path / "audit.html"
    write_page(made([], parts=[part([sample(1, 4, by="text")], by="text")]), file)
    with Opened(browser, file) as page:
        assert page.locator("#responses h2").inner_text() == "Texts"
        assert "Top-1 agreement" in page.locator(".tiles").inner_text()
        assert page.locator("#pairs-title").is_hidden()
    one = interval(0.9, 0.01, n=10, clusters=10)
    bytewise = replace(
        made([]), parts=[], bits_per_byte=BitsPerByte(one, one, one), precision=None, gate=None
    )
    write_page(bytewise, file)
    with Opened(browser, file) as page:
        assert "bits per byte" in page.locator(".tiles").inner_text()
        assert page.locator("#responses").is_hidden()
    audits = [made([sample(1, 4)], name=f"models/step-{n}00") for n in (1, 2, 3)]
    write_drift(drift_of(audits), audits, tmp_path)
    with Opened(browser, tmp_path / "drift.html") as page:
        assert page.locator("figure").count() == 3
        page.locator("svg[data-chart='0']").focus()
        page.keyboard.press("End")
        assert "checkpoint's name 300" in page.locator("#tip").inner_text()
    drift = json.loads((tmp_path / "drift.json").read_text())
    assert [point["at"] for point in drift["points"]] == [100.0, 200.0, 300.0]
    places = drift_of([audits[1], audits[0]]).points
    assert [point.at for point in places] == [1.0, 2.0]


def standing(step: int, run: str = "leashed") -> CheckpointInRun:
    trail = [Spot(n / 10, n / 20, 0.05) for n in range(step // 100)]
    frontier = [Spot(n / 5, n / 6, 0.02) for n in range(4)]
    return CheckpointInRun(
        run, step, step / 500, 0.04, "held-out prompts", 1.0, 0.1, trail, frontier
    )


@pytest.mark.browser
@needs_chromium
def test_score_against_root_kl(browser, tmp_path) -> None:
    file = tmp_path / "audit.html"
    write_page(made([sample(1, 4)], standing=standing(800)), file)
    with Opened(browser, file) as page:
        chart = page.locator("figure", has_text="Score against √KL")
        assert chart.locator(".spot circle").count() == 1
        legend = chart.locator(".legend").inner_text()
        assert all(f in legend for f in ("audited", "steps of the run", "the optimum, as planned"))
        chart.locator("svg[data-chart]").focus()
        page.keyboard.press("End")
        # √(40 · 0.1 nats), the synthetic audit's mean per response.
        assert "√KL 2" in page.locator("#tip").inner_text()
        assert "1.60 ± 0.0400" in page.locator("#tip").inner_text()
    audits = [
        made([sample(1, 4)], name=f"models/step-{n}00", standing=standing(n * 100, run))
        for n, run in ((1, "<b>a</b>"), (2, "<b>a</b>"), (3, "other"))
    ]
    write_drift(drift_of(audits), audits, tmp_path)
    with Opened(browser, tmp_path / "drift.html") as page:
        assert page.locator("figure").count() == 5
        chart = page.locator("figure", has_text="Score against √KL").first
        assert chart.locator(".spot circle").count() == 3
        assert "<b>a</b>, audited" in chart.locator(".legend").inner_text()
        assert "0.600 ± 0.040" in page.locator("tbody").first.inner_text()
    found = json.loads((tmp_path / "drift.json").read_text())
    assert [point["standing"]["score"] for point in found["points"]] == [0.2, 0.4, 0.6]


@pytest.mark.browser
@needs_chromium
def test_drift_fits_a_phone(browser, tmp_path) -> None:
    audits = [
        made([sample(1, 4)], name=f"models/long-name-of-a-checkpoint/step-{n}00",
             standing=standing(n * 100)) for n in (1, 2)
    ]  # fmt: skip
    write_drift(drift_of(audits), audits, tmp_path)
    with Opened(browser, tmp_path / "drift.html", viewport={"width": 390, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_page_without_finite_numbers() -> None:
    infinite = interval(math.inf, None, n=2, clusters=2)
    bad = replace(
        part([sample(1, 4, kl=[math.inf, 0.1, math.nan, 0.2])]),
        measures={"kl": Measure(infinite, infinite)}, positions=[], histogram=[],
    )  # fmt: skip
    assert "∞" in render(made([], parts=[bad]))
