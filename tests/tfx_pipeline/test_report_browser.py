"""The pages of the report in a real browser, offline: sorted, filtered, by keyboard, in the dark, printed."""

import dataclasses
import itertools
import re
import shutil

import pytest

from tests.tfx_pipeline.report_world import make_sources, with_everything
from tfx_pipeline.report import history
from tfx_pipeline.report.collect import collect
from tfx_pipeline.report.comparison_page import render_comparison
from tfx_pipeline.report.facts import Figure, SliceFacts, read_facts
from tfx_pipeline.report.render import SECTIONS, write_report

playwright = pytest.importorskip(
    "playwright.sync_api", reason="BROWSER NOT TESTED: playwright is not installed"
)
pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A browser that looks for nothing on the network by itself.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
]
PAGES = ("index.html", "runs.html", "compare.html")
# The contrast that WCAG 2 asks for at level AA: of text, and of large text.
TEXT_CONTRAST, LARGE_TEXT_CONTRAST = 4.5, 3.0


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("BROWSER NOT TESTED: no chromium on PATH; on Debian: apt install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The reports of two runs, the page over both, and their comparison."""
    folder = tmp_path_factory.mktemp("browser")
    facts = with_everything(collect(make_sources(folder)))
    # Enough slices to sort: seven countries, the more people the better.
    countries = {f"country = {name}": place for place, name in enumerate("ABCDEFG")}
    figures = (
        Figure(name, "retrieval/recall_at_100", 50, 0.1 + place / 100) for name, place in countries.items()
    )
    sizes = (SliceFacts(name, 10 * place + 10, 10 * place + 10, "") for name, place in countries.items())
    retrieval = facts.models["retrieval"]
    facts = dataclasses.replace(
        facts,
        models={
            **facts.models,
            "retrieval": dataclasses.replace(
                retrieval, figures=(*retrieval.figures, *figures), slices=(*retrieval.slices, *sizes)
            ),
        },
    )
    earlier = dataclasses.replace(facts, created_unix_s=facts.created_unix_s - 86_400)
    for run in (earlier, facts):
        write_report(run, folder / "artifact")
        history.publish(folder / "artifact", folder / "report", facts.timings)
    (folder / "report" / "compare.html").write_text(render_comparison(earlier, facts), "utf-8")
    return folder / "report"


@pytest.fixture
def open_page(browser, folder):
    """Opens a page without a network and fails on what the console or the network says."""
    problems, contexts = [], []

    def open_page(name="index.html", **options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        requests = []
        page.goto((folder / name).as_uri())
        problems.extend(url for url in requests if not url.startswith(("data:", (folder / name).as_uri())))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def rows(page, table="table-slices-retrieval"):
    """First cells of the rows that can be seen, from top to bottom."""
    return page.locator(f"#{table} tbody tr:visible th").all_inner_texts()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_open_offline_with_content_in_every_section(open_page, name, scheme):
    page = open_page(name, color_scheme=scheme)
    sections = page.locator("main > section")
    assert sections.count() == len(page.locator("nav a[href^='#']").all())
    for text in sections.all_inner_texts():
        assert len(text.split()) > 5, text
    if name == "index.html":
        assert sections.count() == len(SECTIONS)


def test_all_links_between_the_pages_lead_somewhere(open_page):
    page = open_page("runs.html")
    page.locator("#table-all-runs a").first.click()
    page.wait_for_load_state()
    assert "Run report" in page.locator("header").inner_text()
    page.get_by_role("link", name="All runs").click()
    page.wait_for_load_state()
    assert "2 runs left a report" in page.locator("h1").inner_text()


def test_slices_sort_by_any_column_and_undefined_values_stay_last(open_page):
    page = open_page()
    table = page.locator("#table-slices-retrieval")
    recall = table.locator("thead th").nth(3)
    as_written = rows(page)
    recall.get_by_role("button").click()
    assert recall.get_attribute("aria-sort") == "descending"
    best_first = rows(page)
    # search 0.2212 (less than home's 0.2712), the countries from 0.1 up to 0.16, and one without a value.
    assert best_first[:3] == ["surface = home", "surface = home, device = tv", "surface = search"]
    assert best_first[3] == "country = G" and best_first[-1].startswith("surface = empty")
    recall.get_by_role("button").click()
    assert recall.get_attribute("aria-sort") == "ascending"
    assert rows(page) == [*reversed(best_first[:-1]), best_first[-1]]
    name = table.locator("thead th").first
    name.get_by_role("button").click()
    assert (name.get_attribute("aria-sort"), recall.get_attribute("aria-sort")) == ("ascending", None)
    assert rows(page) == sorted(as_written)


def test_slices_are_filtered_by_words_feature_and_size(open_page):
    page = open_page()
    form = page.locator("form[data-filters=table-slices-retrieval]")
    everything = rows(page)
    form.get_by_label("Sliced by").select_option("country")
    assert rows(page) == [f"country = {name}" for name in "ABCDEFG"]
    assert form.get_by_role("status").inner_text() == f"7 of {len(everything)} shown"
    form.get_by_label("At least").fill("40")
    assert rows(page) == [f"country = {name}" for name in "DEFG"]
    form.get_by_label("Search").fill("nobody")
    assert rows(page) == []
    form.get_by_role("button", name="Clear").click()
    page.wait_for_timeout(50)
    assert rows(page) == everything


def test_keyboard_reaches_everything_and_reads_the_plots(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.url.endswith("#verdict")
    button = page.locator("#table-slices-retrieval thead button").nth(1)
    button.focus()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    assert page.locator("#table-slices-retrieval thead th").nth(1).get_attribute("aria-sort") == "descending"
    figure = page.locator("#metrics figure").first
    figure.focus()
    page.keyboard.press("ArrowRight")
    told = " ".join(figure.locator(".tip").inner_text().split())
    assert told == (
        "Recall@k, k 10 this model 0.0400 (0.0300 to 0.0500) popularity 0.0370 recent popularity 0.0470"
    )
    assert figure.get_by_role("status").inner_text().startswith("Recall@k, k 10: this model 0.0400")
    page.keyboard.press("Escape")
    assert figure.locator(".tip").is_hidden()


def test_pointing_at_a_plot_tells_the_values_there(open_page):
    page = open_page()
    plot = page.locator("#metrics figure svg.plot").first
    plot.scroll_into_view_if_needed()
    tip = page.locator("#metrics figure .tip").first
    assert tip.is_hidden()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + box["height"] / 3)
    assert "Recall@k, k 100" in tip.inner_text()
    shown = tip.bounding_box()
    assert shown["x"] >= box["x"] and shown["x"] + shown["width"] <= box["x"] + box["width"] + 20


# Of every element with text of its own: the contrast with the nearest background that is not transparent.
CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [x, y, z] = [r, g, b].map((value) => linear(value / 255));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const background = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || element.closest("script, .skip, .sr") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const text = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [luminance(parse(text)), luminance(background(element))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    found.push([(a + 0.05) / (b + 0.05), large, element.tagName, element.textContent.slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(open_page, name, scheme):
    page = open_page(name, color_scheme=scheme)
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 50
    weak = [found for found in contrasts if found[0] < (LARGE_TEXT_CONTRAST if found[1] else TEXT_CONTRAST)]
    assert weak == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    is_dark = sum(map(int, re.findall(r"\d+", paper)[:3])) < 3 * 128
    assert is_dark == (scheme == "dark")


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_is_described_and_every_control_has_a_name(open_page, name):
    page = open_page(name)
    for picture in page.locator("svg").all():
        assert picture.get_attribute("role") == "img"
        assert len(picture.get_attribute("aria-label")) > 10
    for control in page.locator("input, select, button").all():
        assert control.evaluate(
            "e => (e.labels && e.labels.length ? e.labels[0].textContent : e.textContent).trim()"
        )
    assert page.locator("h1").count() == 1
    levels = [
        int(tag[1]) for tag in page.eval_on_selector_all("h1, h2, h3", "all => all.map(e => e.tagName)")
    ]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


@pytest.mark.parametrize("name", PAGES)
def test_a_narrow_screen_scrolls_tables_not_the_page(open_page, name):
    page = open_page(name, viewport={"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 400


def test_without_scripts_every_row_is_there_and_no_dead_control(open_page):
    page = open_page(java_script_enabled=False)
    assert len(rows(page)) == 12
    assert page.locator("button:visible, input:visible, select:visible").count() == 0


def test_print_shows_light_paper_all_numbers_and_no_controls(open_page, tmp_path):
    page = open_page(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav:visible, form:visible").count() == 0
    # The numbers below a closed heading take room on paper.
    assert page.locator("details table").first.bounding_box()["height"] > 20
    assert len(page.pdf()) > 20_000


def test_the_facts_of_the_page_are_those_of_the_json(open_page, folder):
    page = open_page()
    facts = read_facts(folder / "metrics.json")
    assert facts.run_id in page.locator("header").inner_text()
    value = facts.models["retrieval"].overall["retrieval/recall_at_100"]
    assert page.locator(f"#metrics td[data-value='{value}']").first.inner_text().startswith("0.2512")
