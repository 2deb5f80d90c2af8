"""Every page on a phone and on a desktop: nothing overflows, the answer comes first."""

import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from audit_models import SMALL, change, noise, write_prompts
from browser import Opened, needs_chromium
from synthetic_run import HOSTILE, write_synthetic_run

from kleash.auditing.api import audit
from kleash.auditing.drift_curve import drift_of, write_drift
from kleash.auditing.html import write_audit
from kleash.cli.plan import PlanRequest, plan_sentences, write_plan
from kleash.report.html import build_report, write_report
from kleash.report.html_template import short_path
from kleash.report.svg_chart import Chart, Point, Series, draw
from kleash.storage.events import new_event
from kleash.storage.plan_file import make_frontier
from kleash.storage.run_directory import read_run

pytestmark = [pytest.mark.browser, needs_chromium]
LONG = "a-name-without-a-space-" + "0123456789" * 6
PAGES = ("one", "several", "audit", "drift", "plan")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    event = new_event(20, "refused", "words " + LONG + HOSTILE[2])
    runs = [
        write_synthetic_run(folder / LONG, steps=24, events=(event,)),
        write_synthetic_run(folder / "free", steps=24, target=None, beta=0.0, gold_falls=True),
        write_synthetic_run(folder / "third", steps=24, target=3.0, seed=2),
    ]
    found = {"one": write_report(runs[:1])[0], "several": write_report(runs)[0]}
    tiny_models.save_model(folder / "base")
    moved: list[Path] = []
    for step in (1, 2):
        at = folder / LONG[:80] / "checkpoints" / f"step-{step:06d}"
        at.mkdir(parents=True)
        change(folder / "base", at / "policy", noise)
        moved.append(at / "policy")
    prompts = write_prompts(folder / "prompts.jsonl")
    audits = [audit(path, folder / "base", prompts, both=True, **SMALL) for path in moved]
    for name in ("audit", "drift"):
        (folder / name).mkdir()
    found["audit"] = write_audit(audits[0], folder / "audit")
    write_drift(drift_of(audits), audits, folder / "drift")
    found["drift"] = folder / "drift" / "drift.html"
    scores = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * 3 + 1234
    plan = make_frontier(scores, prompts=list(range(16)), about={}, betas=[12.3, 0.01])
    told = plan_sentences(plan, PlanRequest(target_kl=1.0))
    found["plan"] = write_plan(folder / "plan", plan, told, title=f"/data/{LONG}/{LONG}/mine.yaml")
    yield found
    shutil.rmtree(folder)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_no_page_overflows(browser, pages, width: int, scheme: str) -> None:
    for name in PAGES:
        view = {"width": width, "height": 844}
        with Opened(browser, pages[name], viewport=view, color_scheme=scheme) as page:
            page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            assert page.evaluate("document.documentElement.scrollWidth") == width, name
            # Nor is there anything inside that scrolls sideways without a sign of it.
            hidden = page.evaluate(
                """() => [...document.querySelectorAll('table, .scroll')].filter(
                    n => n.scrollWidth > n.clientWidth + 1 && n.offsetParent).length"""
            )
            assert hidden == 0, name


def test_the_answer_is_in_the_first_screen_of_a_comparison(browser, pages) -> None:
    with Opened(browser, pages["several"], viewport={"width": 1280, "height": 900}) as page:
        table = page.locator("#summary table.compare")
        box = table.bounding_box()
        assert box["y"] + box["height"] < 900
        rows = table.locator("tbody tr")
        said = rows.all_inner_texts()
        assert "on budget" in said[0] and "no budget was given" in said[1]
        assert all("of score" in text and "per nat" in text for text in said)
        assert "over-optimisation" in said[1] and "nothing found" in said[0]
        assert page.evaluate("document.documentElement.scrollHeight") < 9500


def test_what_a_run_says_first_is_what_its_metrics_say(tmp_path: Path) -> None:
    over = write_synthetic_run(tmp_path / "over", steps=30, target=4.0)
    run = build_report([read_run(over)])["runs"][0]
    third = [line["objective/kl_ref"] for line in run["metrics"][-10:]]
    assert f"{sum(third) / 10:.2f} of 4.00 nats" in run["answer"]["leash"]
    scores = [line["objective/scores"] for line in run["metrics"]]
    gained = sum(scores[-10:]) / 10 - scores[0]
    assert run["answer"]["gained"].startswith(f"{gained:.2f} of score")
    warnings = [one["sentence"] for one in run["findings"] if one["level"] == "warning"]
    assert run["answer"]["wrong"] == warnings


@pytest.mark.parametrize("name", ["one", "several", "audit", "drift"])
def test_every_number_leads_to_its_definition_which_unfolds(browser, pages, name: str) -> None:
    with Opened(browser, pages[name]) as page:
        assert not page.locator("#definitions details").evaluate("d => d.open")
        links = page.locator("a.what")
        targets = links.evaluate_all("all => all.map(a => a.getAttribute('href').slice(1))")
        assert targets and all(page.locator(f"[id='{target}']").count() == 1 for target in targets)
        links.first.click()
        page.wait_for_timeout(100)
        assert page.locator(f"[id='{targets[0]}']").is_visible()


def test_no_chart_stands_alone_in_its_row(browser, pages) -> None:
    with Opened(browser, pages["several"], viewport={"width": 1280, "height": 900}) as page:
        rows = page.locator(".charts").evaluate_all(
            """all => all.map(g => { const at = {}; for (const c of g.children) {
                const y = Math.round(c.getBoundingClientRect().top); at[y] = (at[y] || 0) + 1; }
                return Object.values(at); })"""
        )
    assert rows and all(len(counts) == 1 or min(counts) > 1 for counts in rows)


def test_sampled_lines_of_two_runs_can_be_told_apart(browser, pages) -> None:
    with Opened(browser, pages["several"]) as page:
        dashes = page.locator("svg[data-chart='0'] .faint .curve").evaluate_all(
            "all => all.map(n => getComputedStyle(n).strokeDasharray)"
        )
        swatches = (
            page.locator("figure")
            .first.locator(".swatch.faint")
            .evaluate_all("all => all.map(n => getComputedStyle(n).borderTopStyle)")
        )
    assert len(set(dashes)) == len(dashes) == 3
    assert len(set(swatches)) == 3


def test_checkpoints_are_counted_and_named(browser, pages) -> None:
    with Opened(browser, pages["drift"]) as page:
        labels = page.locator("svg[data-chart='0'] text[text-anchor=middle]").all_text_contents()
        assert labels == ["1", "2"]
        captions = page.locator("figcaption p").all_inner_texts()
        assert all("40 prompts a point" in text for text in captions[:3])
    with Opened(browser, pages["audit"]) as page:
        assert page.locator("h1").inner_text().endswith("/step-000001")
        assert "n = 40 prompts" in page.locator(".tile").first.inner_text()
        assert "n = 40 prompts (" in page.locator("figcaption p").first.inner_text()
        assert "checkpoints/step-000001/policy" in page.locator(".byline").inner_text()
    with Opened(browser, pages["plan"]) as page:
        assert page.locator("h1").inner_text() == f"{LONG}/mine.yaml"


def test_ticks_between_whole_numbers_stay_where_values_are_not_whole() -> None:
    def ticks(*places: float) -> list[str]:
        series = Series("a", [Point(x, x) for x in places])
        return [tick.label for tick in draw(Chart("t", "u", "", "", [series])).x_ticks]

    assert ticks(1.0, 2.0) == ["1", "2"] and ticks(1.0, 2.0, 3.0) == ["1", "2", "3"]
    assert ticks(1.0, 1.5)[1] != "2"


@pytest.mark.parametrize("path", ["org/name", "mine.yaml", "/", ""])
def test_a_short_name_stays(path: str) -> None:
    assert short_path(path) == path
