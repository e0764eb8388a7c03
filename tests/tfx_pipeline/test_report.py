"""A whole report from small synthetic artifacts, whole and with pieces missing."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import re

import pytest

from tests.tfx_pipeline.report_world import EVIL, make_sources, with_everything
from tfx_pipeline.report import charts, formatting, plots, views
from tfx_pipeline.report.collect import collect
from tfx_pipeline.report.facts import Figure, read_facts
from tfx_pipeline.report.render import SECTIONS as SECTION_TITLES
from tfx_pipeline.report.render import write_report
from trainer.off_policy import PolicyFacts, write_policies

SECTIONS = tuple(section for section, _ in SECTION_TITLES)


class Page(html.parser.HTMLParser):
    """Text by section, all attributes, and whether every tag is closed in order."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "use", "path", "rect"})

    def __init__(self, text):
        super().__init__()
        self.sections, self.attributes, self.tags = {}, [], []
        self._open, self._section = [], None
        header = text[text.index("<header>") : text.index("</header>")]
        self.header = " ".join(re.sub(r"<[^>]*>", " ", header).split())
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "section":
            self._section = dict(attributes)["id"]
            self.sections[self._section] = ""
        if tag not in self.VOID:
            self._open.append(tag)
        self.handle_data(" ")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self._open.pop() == tag
        if tag == "section":
            self._section = None

    def handle_data(self, data):
        if self._section:
            self.sections[self._section] += data

    def text(self, section):
        return " ".join(self.sections[section].split())


def report(sources, folder, complete=lambda facts: facts):
    """The written page, parsed, the written JSON, and the page's text."""
    write_report(complete(collect(sources)), folder)
    text = (folder / "index.html").read_text(encoding="utf-8")
    return Page(text), json.loads((folder / "metrics.json").read_text(encoding="utf-8")), text


@pytest.fixture
def sources(tmp_path):
    """Where the artifacts of the run lie; a test may break them."""
    return make_sources(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The report of the run with nothing missing: page, JSON and text."""
    folder = tmp_path_factory.mktemp("whole")
    return report(make_sources(folder), folder / "report", complete=with_everything)


def test_every_section_has_content_and_nothing_is_missing(whole):
    page, _, text = whole
    assert tuple(page.sections) == SECTIONS
    for section in SECTIONS:
        assert len(page.text(section)) > 60, section
    assert 'class="missing"' not in text
    assert len(text) < 2_000_000


def test_verdict_names_the_failed_gate_its_value_and_its_limit(whole):
    page, _, _ = whole
    verdict = page.text("verdict")
    assert "Blessed and pushed as version 1700000000" in verdict
    assert (
        "Recall@100 0.2512 (0.2412 to 0.2612) Better? No clear difference from recent popularity" in verdict
    )
    assert "the best baseline: +0.0002 (−0.0098 to +0.0102) For whom? Surely better than" in verdict
    assert (
        "than recent popularity on 2 of 3 slices, most on surface = home (+0.0202); surely worse on 1, "
        "most on surface = search (−0.0298). Weakest of 4 slices: user type = cold (0.1250)"
    ) in verdict
    assert "How sure? 95% intervals over 1,009 users; other seeds move it by 0.0141" in verdict
    assert "Better? Surely worse than the last blessed model: −0.0500 (−0.0600 to −0.0400)" in verdict
    assert (
        "Surely better than the last blessed model on none of 2 slices; surely worse on 2, "
        "most on surface = search (−0.0700). Surely better than item mean on 2 of 2 slices"
    ) in verdict
    reason = "ranking/click/auc changed by −0.0500, required: no more than 0.01 worse."
    assert reason in verdict
    assert page.header.startswith(
        f"Run report · toy Only the retrieval model was released. Ranking: {reason}"
    )
    gates = page.text("gates")
    assert gates.index("failed") < gates.index("passed") < gates.index("not applied compared with nothing")


def test_failed_infra_validation_is_the_reason_when_a_blessed_model_is_not_pushed(sources, tmp_path):
    models = {name: dataclasses.replace(model, pushed_version=None) for name, model in sources.models.items()}
    sources = dataclasses.replace(
        sources, infra_blessed=False, infra_reason="gRPC and REST recommend different items", models=models
    )
    page, _, text = report(sources, tmp_path / "report")
    assert "Nothing was released." in text
    assert "Blessed, but not pushed" in page.text("verdict")
    assert "gRPC and REST recommend different items" in page.text("verdict")


def test_a_blessed_model_whose_partner_is_not_blessed_says_so(sources, tmp_path):
    models = {**sources.models}
    models["retrieval"] = dataclasses.replace(models["retrieval"], pushed_version=None)
    page, _, _ = report(dataclasses.replace(sources, models=models), tmp_path / "report")
    assert "Bundles are pushed together, and ranking is not blessed." in page.text("verdict")
    assert "its log says why" not in page.text("verdict")


def test_metrics_stand_beside_rivals_with_difference_interval_and_best_value(whole):
    page, _, text = whole
    metrics = page.text("metrics")
    assert "Recall@100 1,009 0.2512 (best) (0.2412 to 0.2612) 0.2190 +0.0322 0.2510 +0.0002" in metrics
    # Of errors the smaller is the better.
    assert "watch time MAE 1,009 18.64 (best) (18.63 to 18.65) 18.69 −0.0500 – 19.81 −1.170" in metrics
    assert re.search(r'<small class="better">−1\.170', text)
    # The interval of this difference holds zero.
    assert "<small>+0.0002</small>" in text
    assert "Not compared with last blessed: no model was blessed before." in metrics
    assert "click AUC item mean +0.0624 +0.0524 to +0.0724 0.2500" in metrics
    assert "popularity train positives of an item" in metrics


@pytest.mark.parametrize(
    ("section", "texts"),
    [
        pytest.param("changes", ["click AUC 0.7794 −0.0500 −0.0600 to −0.0400 −6.4 %"], id="what-moved-most"),
        pytest.param(
            "metrics",
            [
                "Retrieval, whole test split: 1,009 users, 1,009 lists",
                "Distinct items@10 1,009 321.0 (best) 45.00 +276.0",
            ],
            id="what-is-shown-to-anybody",
        ),
        pytest.param(
            "slices",
            [
                "Cold users: no history at the end of training: 42 users, 42 lists",
                "Recall@100 1,009 0.1250 (0.1150 to 0.1350) 0.1500 (best) −0.0250",
                "Cold items: nobody met them before the end of training: 1,009 users, 1,009 lists",
                "Cold item recall@100 77 0.0625 (best) (0.0525 to 0.0725) 0.0000 +0.0625",
                "both popularities place them behind every item that was chosen",
                "Random is one draw of an order for each user",
            ],
            id="cold-users-and-cold-items",
        ),
    ],
)
def test_figures_stand_beside_those_of_rivals_with_interval_and_difference(whole, section, texts):
    page, _, _ = whole
    for text in texts:
        assert text in page.text(section)


def test_slices_come_worst_first_and_say_why_a_value_is_not_there(whole):
    page, _, text = whole
    retrieval, ranking = page.text("slices").split("Ranking by slice")
    names = ("surface = search", "surface = home, device = tv", "user_type = cold", "surface = empty")
    places = [retrieval.index(name) for name in names]
    assert places == sorted(places)
    assert "surface = empty 12 users are too few to tell 12 12 undefined" in retrieval
    # Beside the headline its differences to the last blessed model and to the best baseline.
    assert "impressions click AUC minus last blessed minus item mean" in ranking
    assert (
        "surface = search 300 300 0.7094 (0.6994 to 0.7194) −0.0700 (−0.0800 to −0.0600) "
        "+0.0424 (+0.0324 to +0.0524)"
    ) in ranking
    assert 'data-group="surface × device" data-size="700"' in text


def test_data_are_described_in_local_time_with_warnings_statistics_and_anomalies(whole):
    page, _, _ = whole
    data = page.text("data")
    # 1650816000 is 2022-04-24 16:00 UTC.
    assert "train 1,234,567 500,000 40.5 % 2022-04-25 00:00" in data
    assert "dropped 5,460 exact duplicate rows" in data
    features = page.text("features")
    assert "age float 50.0 % – 34.50 3.250 18 33 12,345 0.0 %" in features
    assert f"user_id text 0.0 % – 7 {EVIL} 9" in features
    anomalies = page.text("anomalies")
    assert "Split train: every feature agrees with the schema." in anomalies
    assert (
        "device error Unexpected string values: Examples contain values missing from the schema" in anomalies
    )


def test_recommendations_say_titles_reasons_and_the_formula(whole):
    page, _, _ = whole
    text = page.text("recommendations")
    assert "score = 1 × click + 0.02 × watch_time" in text
    known, stranger = text.split("User stranger")
    assert known.index("Second film") < known.index("Third film")  # the latest is first
    assert f"1. {EVIL} near to Second film 0.3300 29.00 3.200 0.9100" in known
    assert "unknown to the model" in stranger and "popular 0.3300" in stranger


def test_training_and_index_tell_the_kept_epoch_and_the_recall(whole):
    page, _, text = whole
    assert "2 (kept) 5.000 0.3000" in page.text("training")
    assert "the weights of epoch 2 were kept" in text
    assert (
        "ScaNN finds 97.3 % of the 500 items that exact search puts first; at least 95.0 % was required."
        in page.text("index")
    )


def test_a_run_without_an_objective_says_why_it_has_no_latency(sources, tmp_path):
    (tmp_path / "load.json").unlink()
    page, _, _ = report(sources, tmp_path / "report")
    assert "the configuration sets no objective (slo), so that no load was put on" in page.text("load")


def test_titles_from_data_cannot_become_markup_and_only_the_pages_own_script_may_run(whole):
    page, _, text = whole
    assert page.tags.count("script") == 1
    assert "&lt;script&gt;alert(1)" in text
    script = text[text.index("<script>") + len("<script>") : text.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    )


def test_page_names_no_address_and_ids_are_unique(whole):
    page, _, text = whole
    assert not re.search(r"https?://", text)
    links = [v for name, v in page.attributes if name in ("src", "href", "xlink:href")]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_same_facts_give_the_same_bytes_and_replace_an_older_report(sources, tmp_path):
    facts = collect(sources)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "index.html").write_text("old")
    for name in ("one", "two"):
        write_report(facts, tmp_path / name)
    for file in ("index.html", "metrics.json", "model_card.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert len(list((tmp_path / "two").iterdir())) == 3
    assert not list(tmp_path.glob(".report-*"))


def test_json_holds_flat_metrics_of_model_and_baselines_and_all_facts(whole):
    _, values, _ = whole
    metrics = values["metrics"]
    assert metrics["model"]["retrieval/recall_at_100"] == 0.2512
    assert metrics["model"]["ranking/click/auc"] == 0.7294
    assert metrics["last_blessed"]["ranking/click/auc"] == pytest.approx(0.7794)
    assert metrics["baselines"]["popularity"]["retrieval/recall_at_100"] == 0.2190
    assert metrics["baselines"]["item_mean"] == {"ranking/click/auc": 0.667, "ranking/watch_time/mae": 19.81}
    assert values["facts"]["summary"]["rows"]["train"] == 1_234_567
    assert [split["split"] for split in values["facts"]["statistics"]] == ["train", "eval", "test"]


def test_report_of_a_run_with_every_piece_missing_says_so_in_every_section(sources, tmp_path):
    nowhere = tmp_path / "nowhere"

    def lost(source, **changes):
        paths = (f.name for f in dataclasses.fields(source) if f.name.endswith(("_uri", "_path", "_dir")))
        return dataclasses.replace(source, **dict.fromkeys(paths, nowhere), **changes)

    models = {name: lost(model, blessed=False, pushed_version=None) for name, model in sources.models.items()}
    sources = lost(sources, config_json="not JSON", infra_blessed=False, models=models)
    page, values, text = report(sources, tmp_path / "report")
    assert tuple(page.sections) == SECTIONS
    for section in SECTIONS:
        assert "not available" in page.text(section) or section in {"verdict", "changes"}, section
    assert "No earlier run" in page.text("changes")
    assert "Nothing was released." in text
    assert "The verdicts of the gates cannot be read: there is no" in page.text("verdict")
    assert set(values["facts"]["missing"]) == {
        "config",
        "summary",
        *(
            f"{model}_{piece}"
            for model in ("retrieval", "ranking")
            for piece in ("comparison", "gates", "training")
        ),
        "examples",
        "statistics",
        "anomalies",
        "index",
        "titles",
        "scores",
        "drift",
        "leakage",
        "waterfall",
        "off_policy",
        "load",
    }


@pytest.mark.parametrize(
    ("file", "content", "section", "words"),
    [
        pytest.param(
            "statistics/Split-train/FeatureStats.pb",
            b"\xff\xff",
            "features",
            "not available",
            id="broken proto",
        ),
        pytest.param(
            "recommendations.json", b"[]", "recommendations", "got no answers", id="no recommendations"
        ),
        pytest.param("waterfall/waterfall.json", b"{}", "waterfall", "not available", id="wrong shape"),
        pytest.param("off_policy/off_policy.json", b"{}", "off-policy", "not available", id="no policies"),
        pytest.param("drift.json", b'{"found": 3}', "anomalies", "valid dictionary", id="no drift"),
        pytest.param("retrieval_blessing/gates.json", b"{", "gates", "not available", id="no gates"),
        pytest.param("ranking_run/training_log.json", b"[]", "training", "holds no epoch", id="no epoch"),
        pytest.param(
            "tables/items.parquet", b"PAR1", "recommendations", "Titles are not available", id="no titles"
        ),
    ],
)
def test_one_broken_piece_costs_its_section_only(sources, tmp_path, file, content, section, words):
    (tmp_path / file).write_bytes(content)
    page, _, text = report(sources, tmp_path / "report")
    assert words in page.text(section)
    # Beside it the cost, which the end of the run adds.
    assert text.count('class="missing"') == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123449, "0.1234"),
        (1.23456, "1.235"),
        (18.637, "18.64"),
        (1837.2, "1,837"),
        (43268.0, "43,268"),
        (-0.03121, "−0.0312"),
        (0.00001, "1.00e−05"),
        (0, "0"),
        (None, "undefined"),
        (float("nan"), "undefined"),
    ],
)
def test_numbers_have_four_significant_digits_and_thousands_separators(value, text):
    assert formatting.number(value) == text


def test_plots_take_their_colours_from_the_page():
    svg = plots.line_plot(
        "p", 'a "plot"', [plots.Panel("<b>$x$", "x", [1.0, 2.0], {"a": [1.0, None], "b": [2.0, 3.0]})]
    )
    assert 'aria-label="a &#34;plot&#34;"' in svg
    assert "var(--series-1)" in svg and "var(--series-2)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert "&lt;b&gt;$x$" in svg


def test_a_difference_is_coloured_only_where_its_interval_leaves_zero_out(sources):
    facts = collect(sources)
    notes = {
        row.title: [(cell.note, cell.note_verdict) for cell in row.cells[2:]]
        for row in views.metrics_table("retrieval", facts).rows
    }
    # Popularity, recent popularity: an interval above zero and one around it; distinct items have none.
    assert notes["retrieval/recall_at_100"] == [("+0.0322", "better"), ("+0.0002", "")]
    assert notes["retrieval/distinct_items_at_10"][0] == ("+276.0", "")


def test_no_share_of_the_index_plot_is_above_one(sources):
    drawn = []
    facts = collect(sources)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "line_plot", lambda name, alt, panels: drawn.extend(panels))
        charts.index_plot(facts.index)
    # The lowest share is .91; all panels have the same axis.
    assert [panel.y_limits for panel in drawn] == [pytest.approx((0.89, 1.01))] * 2


def test_off_policy_values_stand_against_the_logging_policy_with_their_support(whole, sources, tmp_path):
    page, values, _ = whole
    text = page.text("off-policy")
    assert "1,535 impressions of 82 users" in text
    assert "A random pick, which is the logging policy, has 0.2500 (0.2000 to 0.3000)." in text
    assert "The largest weight is 12, so that none is clipped." in text
    assert "score 0.4000 (0.3000 to 0.5000) +0.1500 (+0.0500 to +0.2500) 0.0400 75" in text
    assert "popularity 0.3125 (0.2125 to 0.4125) +0.0625 (−0.0375 to +0.1625) 0.0400 61" in text
    assert "No estimate for like: the log cannot tell what the target policy is worth: 1,535 rows" in text
    assert values["facts"]["off_policy"]["estimates"]["score"]["support"]["effective_samples"] == 75.4
    write_report(collect(sources), tmp_path / "report")
    card = (tmp_path / "report" / "model_card.md").read_text()
    assert "| score | 0.4000 (0.3000 to 0.5000) | +0.1500 (+0.0500 to +0.2500) | 0.0400 | 75 |\n" in card
    assert "No estimate for like: the log cannot tell" in card


def test_a_log_without_propensities_says_in_one_line_why_there_is_no_off_policy_value(sources, tmp_path):
    why = "dataset toy does not map exploration and position."
    write_policies(PolicyFacts("click", 0.0, {}, {}, absent=why), tmp_path / "off_policy")
    page, values, _ = report(sources, tmp_path / "report")
    assert page.text("off-policy").endswith(f"first choice is not available: {why}")
    assert values["facts"]["missing"]["off_policy"] == why
    card = (tmp_path / "report" / "model_card.md").read_text()
    assert f"Not available: {why}\n" in card
    assert f"- Not known (off policy): {why}\n" in card


def test_cost_scores_index_waterfall_and_drift_say_their_numbers(whole):
    page, _, _ = whole
    cost = page.text("cost")
    assert "45.50 processor seconds in 30.10 s, at most 2,048 MiB of memory; 1 of 2 components" in cost
    assert "Trainer.ranking 0.1000 0.0000 1,024 reused" in cost
    # 15 groups; 1,000 predictions from 0.05 to 0.95, of which as many come true as predicted.
    assert re.search(r"15 of 15 \d+ 0\.92\d\d 0\.9\d\d\d \(0\.8\d+ to 0\.9\d+\)", page.text("calibration"))
    assert "1 examples whose prediction or label is not a number are left out." in page.text("scores")
    index = page.text("index")
    assert "up to 50 98.0 % 98.0 % undefined 0.5000 1.000 4.000" in index
    assert "50, ScaNN 5 100 91.0 % 91.0 % undefined 0.2500 0.5000" in index
    assert "50, ScaNN (served) 10 100" in index and "500, exact search – – 100.0 %" in index
    load = page.text("load")
    assert "500 requests at 50 per second, 0.2 % without an answer" in load
    assert "total 4.25 9.00 12.50 20.00 the client was busy" in load
    assert (
        "against grpc://host:8500, layout auto: the best 20 of 100 candidates for one of 1,000 users" in load
    )
    assert "At 100 per s: 10 × DeadlineExceededError." in load
    assert "100 per s total 100.0 8.000 16.00 24.00 72.00 1.0 %" in load
    waterfall = page.text("waterfall")
    assert "Of 100 items that 50 of 80 users with one went on to choose, 30 (30.0 %) were among" in waterfall
    assert "all 100 5.0 % (1.2 to 8.9 %) 5 20.0 % 20" in waterfall
    assert "user_type = cold 10 0.0 % 0 60.0 % 6 30.0 % 3 10.0 % 1" in waterfall
    assert "two tower 500 80.0 % (75.0 to 85.0 %) 70.0 % popularity 12.5 %" in waterfall
    leakage = page.text("leakage")
    assert "Leaks were found: temporal splits." in leakage
    assert (
        "temporal splits leak all examples train ends at 9, eval starts at 8 the past only no leak" in leakage
    )
    assert "random split 0.7500 +0.0500" in leakage and "age click 0.6100 400" in leakage
    anomalies = page.text("anomalies")
    assert "device 0.3100 0.1500 too far age 0.0200 0.2000 near enough" in anomalies
    assert "last run’s train split: not measured, there was no run on other data before." in anomalies


def test_plots_tell_values_and_intervals(whole):
    _, _, text = whole
    assert "0.2512 (0.2412 to 0.2612)" in text[text.index("data-readings") :]


def test_the_spread_over_seeds_stands_beside_the_metrics(whole):
    page, _, _ = whole
    metrics = page.text("metrics")
    assert "Retrieval: trained 2 times on the same examples, with other seeds" in metrics
    # Mean .255, standard deviation .01 x sqrt 2; a metric that one seed does not define has no spread.
    assert "Recall@100 0.2512 0.2550 0.0141 0.2450 0.2650" in metrics
    assert "NDCG@100 0.2234 0." not in metrics
    assert "funnel evaluate --model ranking --seeds 5" in metrics


def test_users_who_are_all_alike_have_no_interval_and_no_change_has_no_sign():
    nothing = Figure("surface = tv", "retrieval/recall_at_100", 900, 0.0, 0.0, 0.0)
    assert views.interval(nothing) == ""
    assert views.interval(dataclasses.replace(nothing, high=0.01)) == "(0.0000 to 0.0100)"
    assert [formatting.difference(value) for value in (0.0, 0.1, -0.1)] == ["0.0000", "+0.1000", "−0.1000"]


def test_an_index_of_an_older_export_has_no_times(sources, tmp_path):
    path = tmp_path / "model" / "Format-Serving" / "assets.extra" / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "points": []}))
    page, _, _ = report(sources, tmp_path / "report")
    assert "Recall against the time of a query is not available" in page.text("index")


def test_an_index_without_partitions_says_so(sources, tmp_path):
    path = tmp_path / "model" / "Format-Serving" / "assets.extra" / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "settings": {"num_leaves": 0}}))
    page, _, _ = report(sources, tmp_path / "report")
    assert "none: every item is scored" in page.text("index")


def test_facts_survive_a_way_through_json(sources, tmp_path):
    facts = with_everything(collect(sources))
    write_report(facts, tmp_path / "report")
    assert read_facts(tmp_path / "report" / "metrics.json") == facts


def test_model_card_tells_data_use_metrics_and_limits(sources, tmp_path):
    write_report(collect(sources), tmp_path / "report")
    card = (tmp_path / "report" / "model_card.md").read_text(encoding="utf-8")
    assert re.findall("^## (.*)$", card, flags=re.MULTILINE) == [
        "Models", "Intended use", "Data", "Metrics", "Off-policy evaluation", "Limits",
    ]  # fmt: skip
    assert "| train | 1,234,567 | 500,000 | 2022-04-25 00:00 | 2022-05-04 23:59 |" in card
    assert "| Recall@100 | 0.2512 (0.2412 to 0.2612) | none | 0.2510 (recent popularity) |" in card
    assert "| click AUC | 0.7294 (0.7194 to 0.7394) | 0.7794 | 0.6670 (item mean) |" in card
    assert "Weakest slices of the ranking model by click AUC: surface = search: 0.7094;" in card
    assert "surface = empty" not in card
    assert "deviate from the schema in 1 place;" in card
    assert "`score = 1 × click + 0.02 × watch_time" in card
