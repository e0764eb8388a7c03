"""A whole report from small synthetic artifacts, whole and with pieces missing, and opened in a browser."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import polars as pl
import pytest
from tensorflow_metadata.proto.v0 import anomalies_pb2, statistics_pb2

from schema.errors import DataError
from schema.tables import TablesSummary
from tfx_pipeline.report import formatting, plots
from tfx_pipeline.report.facts import Evaluation, Figure, GateFailure, ReportSources, collect
from tfx_pipeline.report.render import write_report

EVIL = '<script>alert(1)</script> & "Sons"'
SECTIONS = (
    "verdict",
    "metrics",
    "slices",
    "training",
    "index",
    "recommendations",
    "data",
    "anomalies",
    "features",
    "reproduce",
)
CONFIG = {
    "dataset": {
        "name": "toy",
        "utc_offset_hours": 8.0,
        "tasks": [
            {"name": "click", "label": "click", "kind": "binary", "loss_weight": 1.0, "score_weight": 1.0},
            {
                "name": "watch_time",
                "label": "watch_time_s",
                "kind": "watch_time",
                "loss_weight": 0.1,
                "score_weight": 0.02,
            },
        ],
    },
    "retrieval": {"index": {"min_recall": 0.95}},
    "gates": [
        {"metric": "retrieval/recall_at_100", "min": 0.1, "max": None, "max_drop": 0.02},
        {"metric": "ranking/click/auc", "min": 0.6, "max": None, "max_drop": 0.01},
    ],
    "slices": ["surface"],
}
RETRIEVAL_VALUES = {
    "recall_at_10": 0.04,
    "recall_at_100": 0.2512,
    "ndcg_at_10": 0.21,
    "ndcg_at_100": 0.2234,
    "cold_item_recall_at_100": 0.0625,
    "distinct_items_at_10": 321.0,
    "num_queries": 1009,
    "num_cold_item_queries": 77,
    "num_positive_items": 1234,
}
RANKING_VALUES = {
    "click/auc": 0.7294,
    "click/log_loss": 0.51,
    "click/num_examples": 43268,
    "watch_time/mae": 18.64,
    "watch_time/xauc": 0.6819,
    "watch_time/num_examples": 43268,
}


def figures(stage, values, slice_name="", change=0.0):
    return tuple(
        Figure(slice_name, f"{stage}/{key}", value if "num_" in key else value + change)
        for key, value in values.items()
    )


EVALUATIONS = {
    "retrieval": Evaluation(
        candidate=(
            *figures("retrieval", RETRIEVAL_VALUES),
            *figures("retrieval", RETRIEVAL_VALUES, "surface = home", change=0.01),
            *figures("retrieval", RETRIEVAL_VALUES, "surface = search", change=-0.03),
            Figure("surface = empty", "retrieval/recall_at_100", None),
            *figures("retrieval", {"recall_at_100": 0.125, "num_queries": 42}, "user_type = cold"),
        ),
    ),
    "ranking": Evaluation(
        candidate=(
            *figures("ranking", RANKING_VALUES),
            *figures("ranking", RANKING_VALUES, "surface = home", change=0.01),
            *figures("ranking", RANKING_VALUES, "surface = search", change=-0.02),
        ),
        last_blessed=figures("ranking", RANKING_VALUES, change=0.05),
        failures=(
            GateFailure(
                "ranking/click/auc", -0.05, True, "change against the last blessed model at least -0.01"
            ),
        ),
    ),
}


def write_statistics(folder, split, num_examples):
    """50 examples: a text id, and an age of which every second list is empty."""
    proto = statistics_pb2.DatasetFeatureStatisticsList()
    dataset = proto.datasets.add(num_examples=num_examples)
    user = dataset.features.add(type=statistics_pb2.FeatureNameStatistics.STRING)
    user.path.step.append("user_id")
    user.string_stats.unique = 7
    user.string_stats.common_stats.num_non_missing = num_examples
    user.string_stats.common_stats.max_num_values = 1
    user.string_stats.common_stats.tot_num_values = num_examples
    user.string_stats.top_values.add(value=EVIL, frequency=9)
    user.string_stats.rank_histogram.buckets.add(label=EVIL, sample_count=9)
    age = dataset.features.add(type=statistics_pb2.FeatureNameStatistics.FLOAT)
    age.path.step.append("age")
    numbers = age.num_stats
    numbers.common_stats.num_non_missing = num_examples
    numbers.common_stats.max_num_values = 1
    numbers.common_stats.tot_num_values = num_examples // 2
    numbers.mean, numbers.std_dev, numbers.min, numbers.median, numbers.max = 34.5, 3.25, 18, 33, 12345
    numbers.num_zeros = 0
    histogram = numbers.histograms.add(type=statistics_pb2.Histogram.STANDARD)
    for count in (1, 5, 0, 2):
        histogram.buckets.add(sample_count=count)
    path = folder / f"Split-{split}" / "FeatureStats.pb"
    path.parent.mkdir(parents=True)
    path.write_bytes(proto.SerializeToString())


def write_anomalies(folder, split, feature=None):
    proto = anomalies_pb2.Anomalies()
    if feature:
        info = proto.anomaly_info[feature]
        info.severity = anomalies_pb2.AnomalyInfo.ERROR
        info.short_description = "Unexpected string values"
        info.description = "Examples contain values missing from the schema: tv (~3%)."
    path = folder / f"Split-{split}" / "SchemaDiff.pb"
    path.parent.mkdir(parents=True)
    path.write_bytes(proto.SerializeToString())


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def make_sources(tmp_path):
    """Artifacts of a run whose retrieval model was released and whose ranker was rejected."""
    summary = TablesSummary(
        dataset="toy",
        rows={"train": 1_234_567, "eval": 1000, "test": 2000},
        positives={"train": 500_000, "eval": 400, "test": 500},
        users=12_345,
        items=678,
        first_event_unix_s={"train": 1_650_816_000, "eval": 1_651_680_000, "test": 1_651_766_400},
        last_event_unix_s={"train": 1_651_679_999, "eval": 1_651_766_399, "test": 1_652_025_599},
        train_end_unix_s=1_651_680_000,
        label_means={"click": 0.4421},
        warnings=("interactions: dropped 5,460 exact duplicate rows of 228,329",),
    )
    tables = tmp_path / "tables"
    write_json(tables / "summary.json", dataclasses.asdict(summary))
    titles = {"i1": EVIL, "i2": "Second film", "i3": "Third film"}
    pl.DataFrame({"item_id": list(titles), "title": list(titles.values())}).write_parquet(
        tables / "items.parquet"
    )
    for split in ("test", "train", "eval"):
        write_statistics(tmp_path / "statistics", split, 50)
        write_anomalies(tmp_path / "anomalies", split, "device" if split == "test" else None)
    baselines = {
        "retrieval": {
            "popularity": {
                "retrieval/recall_at_10": 0.037,
                "retrieval/recall_at_100": 0.2190,
                "retrieval/distinct_items_at_10": 45.0,
                "retrieval/cold_item_recall_at_100": 0.0,
            },
            "recent_popularity": {"retrieval/recall_at_10": 0.047, "retrieval/recall_at_100": 0.2510},
        },
        "retrieval_cold_users": {"popularity": {"retrieval/recall_at_100": 0.15}},
        "ranking": {
            "click": {"global_mean": {"ranking/click/auc": 0.5}, "item_mean": {"ranking/click/auc": 0.667}},
            "watch_time": {
                "item_mean": {"ranking/watch_time/mae": 19.81, "ranking/watch_time/xauc": float("nan")}
            },
        },
    }
    epochs = range(1, 4)
    recall = (0.1, 0.3, 0.2)
    retrieval_log = [
        {
            "epoch": e,
            "loss": 7 - e,
            "retrieval/recall_at_100": recall[e - 1],
            "retrieval/ndcg_at_100": 0.1,
            "train_s": 2.5,
        }
        for e in epochs
    ]
    ranking_log = [
        {
            "epoch": e,
            "seconds": 3.0,
            "train_loss": 1 / e,
            "eval_loss": 1.0,
            "ranking/click/auc": None if e == 2 else 0.7,
        }
        for e in epochs
    ]
    item = {"item_id": "i1", "rank": 1, "score": 0.91, "retrieval_score": 3.2, "reason_item_id": "i2"}
    answers = [
        {"user_id": "u1", "user_is_known": True, "history": ["i3", "i2"]},
        {"user_id": "stranger", "user_is_known": False, "history": []},
    ]
    for answer in answers:
        reason = "i2" if answer["history"] else ""
        answer["items"] = [
            item | {"reason_item_id": reason, "predictions": {"click": 0.33, "watch_time": 29.0}}
        ]
    index = {
        "num_items": 678,
        "vector_width": 65,
        "settings": {"num_leaves": 26},
        "k": 500,
        "recall": 0.9731,
        "build_s": 1.5,
    }
    write_json(tmp_path / "model" / "Format-Serving" / "assets.extra" / "index.json", index)
    write_json(tmp_path / "retrieval_run" / "training_log.json", retrieval_log)
    write_json(tmp_path / "ranking_run" / "training_log.json", ranking_log)
    return ReportSources(
        tables_dir=tables,
        statistics_uri=str(tmp_path / "statistics"),
        anomalies_uri=str(tmp_path / "anomalies"),
        retrieval_evaluation_uri=str(tmp_path / "retrieval_evaluation"),
        ranking_evaluation_uri=str(tmp_path / "ranking_evaluation"),
        retrieval_blessed=True,
        ranking_blessed=False,
        infra_blessed=True,
        infra_reason="",
        pushed={"retrieval": "1700000000", "ranking": None},
        baselines_path=write_json(tmp_path / "baselines.json", baselines),
        retrieval_run_uri=tmp_path / "retrieval_run",
        ranking_run_uri=tmp_path / "ranking_run",
        retrieval_model_uri=tmp_path / "model",
        recommendations_path=write_json(tmp_path / "recommendations.json", answers),
        config_json=json.dumps(CONFIG),
        funnel_version="9.8.7",
    )


class Page(html.parser.HTMLParser):
    """Text by section, all attributes, and whether every tag is closed in order."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "use", "path", "rect"})

    def __init__(self, text):
        super().__init__()
        self.sections, self.attributes, self.tags = {}, [], []
        self._open, self._section = [], None
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


def evaluations(model, folder):
    return EVALUATIONS[model]


def no_evaluations(model, folder):
    raise DataError(f"no metrics in {folder}")


def report(sources, folder, read_evaluation=evaluations):
    """The written page, parsed, and the written JSON."""
    write_report(collect(sources, read_evaluation), folder)
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
    return report(make_sources(folder), folder / "report")


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
    assert "Recall@100 0.2512, +0.0002 against the best baseline (recent popularity)" in verdict
    assert (
        "click AUC changed by −0.0500 against the last blessed model; the gate asks for at least −0.01."
        in verdict
    )
    # The gate on change of the retrieval model had nothing to compare with.
    assert "no blessed model yet not applied" in verdict


def test_failed_infra_validation_is_the_reason_when_a_blessed_model_is_not_pushed(sources, tmp_path):
    sources = dataclasses.replace(
        sources,
        infra_blessed=False,
        infra_reason="gRPC and REST recommend different items",
        pushed={"retrieval": None, "ranking": None},
    )
    page, _, text = report(sources, tmp_path / "report")
    assert "Nothing was released." in text
    assert "Blessed, but not pushed" in page.text("verdict")
    assert "gRPC and REST recommend different items" in page.text("verdict")


def test_metrics_stand_beside_baselines_with_difference_and_best_value(whole):
    page, _, text = whole
    metrics = page.text("metrics")
    assert "Recall@100 0.2512 (best) 0.2190 +0.0322 0.2510 +0.0002" in metrics
    # Of errors the smaller is the better: the last blessed model has 18.69, the item mean 19.81.
    assert "watch time MAE 18.64 (best) 18.69 −0.0500 – 19.81 −1.170" in metrics
    assert re.search(r'<td class="best">0\.2512', text)
    assert re.search(r'<small class="better">−1\.170', text)


def test_cold_users_and_cold_items_stand_beside_baselines_of_their_own(whole):
    page, _, _ = whole
    slices = page.text("slices")
    assert "Cold users: no history at the end of training: 42 users" in slices
    assert "Recall@100 0.1250 0.1500 (best) −0.0250" in slices
    assert "Cold items: nobody met them before the end of training: 77 users with a cold item" in slices
    assert "Cold item recall@100 0.0625 (best) 0.0000 +0.0625" in slices
    assert "Both popularities find none by construction" in slices


def test_what_is_shown_to_anybody_stands_beside_what_people_chose(whole):
    page, _, _ = whole
    metrics = page.text("metrics")
    assert "Retrieval, whole test split: 1,009 users; 1,234 items in what they chose" in metrics
    assert "Distinct items@10 321.0 (best) 45.00 +276.0" in metrics


def test_slices_come_worst_first_and_undefined_ones_last(whole):
    page, _, _ = whole
    retrieval, ranking = page.text("slices").split("Ranking by slice")
    for text, names in ((retrieval, ("search", "home", "empty")), (ranking, ("search", "home"))):
        places = [text.index(f"surface = {name}") for name in names]
        assert places == sorted(places)
    assert "surface = empty undefined undefined" in retrieval


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


def test_titles_from_data_cannot_become_markup(whole):
    page, _, text = whole
    assert "script" not in page.tags
    assert "&lt;script&gt;alert(1)" in text


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
    facts = collect(sources, evaluations)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "index.html").write_text("old")
    for name in ("one", "two"):
        write_report(facts, tmp_path / name)
    for file in ("index.html", "metrics.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["index.html", "metrics.json"]
    assert not list(tmp_path.glob(".report-*"))


def test_json_holds_flat_metrics_of_model_and_baselines_and_all_facts(whole):
    _, values, _ = whole
    metrics = values["metrics"]
    assert metrics["model"]["retrieval/recall_at_100"] == 0.2512
    assert metrics["model"]["ranking/click/auc"] == 0.7294
    assert metrics["last_blessed"]["ranking/click/auc"] == pytest.approx(0.7794)
    assert metrics["baselines"]["popularity"]["retrieval/recall_at_100"] == 0.2190
    assert metrics["baselines"]["item_mean"] == {
        "ranking/click/auc": 0.667,
        "ranking/watch_time/mae": 19.81,
        "ranking/watch_time/xauc": None,
    }
    assert values["facts"]["summary"]["rows"]["train"] == 1_234_567
    assert [split["split"] for split in values["facts"]["statistics"]] == ["train", "eval", "test"]


def test_report_of_a_run_with_every_piece_missing_says_so_in_every_section(sources, tmp_path):
    nowhere = tmp_path / "nowhere"
    paths = {
        field.name: nowhere
        for field in dataclasses.fields(sources)
        if field.name.endswith(("_uri", "_path", "_dir"))
    }
    sources = dataclasses.replace(
        sources, **paths, config_json="not JSON", retrieval_blessed=False, pushed={}, infra_blessed=False
    )
    page, values, text = report(sources, tmp_path / "report", no_evaluations)
    assert tuple(page.sections) == SECTIONS
    for section in SECTIONS:
        assert "not available" in page.text(section) or section == "verdict", section
    assert "Nothing was released." in text
    assert "The evaluation cannot be read: no metrics in" in page.text("verdict")
    assert set(values["facts"]["missing"]) == {
        "config",
        "summary",
        "baselines",
        "retrieval_evaluation",
        "ranking_evaluation",
        "retrieval_training",
        "ranking_training",
        "examples",
        "statistics",
        "anomalies",
        "index",
        "titles",
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
        pytest.param("baselines.json", b'{"retrieval": 3}', "metrics", "valid dictionary", id="wrong shape"),
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
    assert text.count('class="missing"') == 1


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


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_opens_offline_in_chromium_without_console_errors(sources, tmp_path, scheme):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("BROWSER NOT TESTED: no chromium on PATH; install chromium to open the report in it")
    report(sources, tmp_path / "report")
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        "--window-size=1280,4000",
        f"--screenshot={tmp_path / 'page.png'}",
        (tmp_path / "report" / "index.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert (tmp_path / "page.png").stat().st_size > 20_000
