"""Reports of several runs: kept, listed, compared."""

import dataclasses
import json
import re

import pytest
from click.testing import CliRunner

from schema.errors import DataError
from tests.tfx_pipeline.report_world import LEAKAGE, LOAD_TEST, TIMINGS, make_sources
from tfx_pipeline.cli import main
from tfx_pipeline.drift_facts import FeatureDrift
from tfx_pipeline.report import comparison_page, history
from tfx_pipeline.report.collect import collect
from tfx_pipeline.report.comparison_page import comparability, render_comparison
from tfx_pipeline.report.differences import differences
from tfx_pipeline.report.facts import read_facts
from tfx_pipeline.report.render import write_report

DAY_S = 86_400
# 2026-11-27 09:00:00 UTC.
FIRST_UNIX_S = 1_795_770_000
FIRST, SECOND = "20261127T090000Z", "20261128T090000Z"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The facts of a run."""
    facts = collect(make_sources(tmp_path_factory.mktemp("first")))
    return dataclasses.replace(facts, created_unix_s=FIRST_UNIX_S)


def moved(facts, by):
    """The same models with every metric higher by that much, all with intervals of 0.02."""
    models = {
        name: dataclasses.replace(
            model,
            figures=tuple(
                figure
                if figure.value is None
                else dataclasses.replace(
                    figure,
                    value=figure.value + by,
                    low=figure.value + by - 0.01,
                    high=figure.value + by + 0.01,
                )
                for figure in model.figures
            ),
        )
        for name, model in facts.models.items()
    }
    return dataclasses.replace(facts, models=models)


@pytest.fixture(scope="module")
def second(first):
    """A day later: another batch size, another ranker package, one more user, better models."""
    config = json.loads(json.dumps(first.config))
    config["gates"][0]["min"] = 0.2
    summary = dataclasses.replace(first.summary, users=first.summary.users + 1)
    return dataclasses.replace(
        moved(first, 0.05),
        created_unix_s=FIRST_UNIX_S + DAY_S,
        config=config,
        summary=summary,
        versions={**first.versions, "numpy": "0.0.1"},
        code_version="9.9.0+def",
    )


@pytest.fixture
def no_plots(monkeypatch):
    """Tests of files and words do without plots, which take the time."""
    monkeypatch.setattr(comparison_page.plots, "line_plot", lambda *args: "")
    monkeypatch.setattr(comparison_page.plots, "dot_plot", lambda *args: "")


def publish(facts, tmp_path, timings=TIMINGS):
    write_report(facts, tmp_path / "artifact")
    return history.publish(tmp_path / "artifact", tmp_path / "report", timings)


def test_each_run_keeps_its_page_and_the_newest_is_shown_first(first, second, tmp_path, no_plots):
    page = publish(first, tmp_path)
    assert page == tmp_path / "report" / "index.html"
    publish(second, tmp_path)
    report = tmp_path / "report"
    files = {"index.html", "metrics.json", "model_card.md"}
    for folder in (report / FIRST, report / SECOND):
        assert {path.name for path in folder.iterdir()} == files
        assert 'href="../runs.html"' in (folder / "index.html").read_text("utf-8")
    assert {path.name for path in report.iterdir()} == files | {"runs.html", FIRST, SECOND}
    assert f"Run {SECOND}" in page.read_text("utf-8")
    assert 'href="runs.html"' in page.read_text("utf-8")
    runs = (report / "runs.html").read_text("utf-8")
    assert "2 runs left a report" in runs
    assert runs.index(f'href="{SECOND}/index.html"') < runs.index(f'href="{FIRST}/index.html"')


def test_a_published_run_has_its_cost_and_what_changed_since_the_last_blessed_one(
    first, second, tmp_path, no_plots
):
    publish(first, tmp_path)
    page = publish(second, tmp_path).read_text("utf-8")
    facts = read_facts(tmp_path / "report" / SECOND / "metrics.json")
    assert facts.timings == TIMINGS
    assert set(facts.machine) == {"Processor", "Cores", "Memory", "System", "Commit"}
    assert (facts.since.before, facts.since.after) == (FIRST, SECOND)
    assert [setting.name for setting in facts.since.config] == ["gates[retrieval/recall_at_100].min"]
    assert "Different configuration: 1 value differs." in page
    assert read_facts(tmp_path / "report" / FIRST / "metrics.json").since is None


def test_a_run_with_undefined_numbers_everywhere_is_published_and_says_so(first, tmp_path, no_plots):
    nan = float("nan")
    answer = first.examples[0]
    item = dataclasses.replace(answer.items[0], score=nan, retrieval_score=nan, predictions={"click": nan})
    drift = dataclasses.replace(first.drift, found={"last_run": (FeatureDrift("age", None, 0.2),)})
    facts = dataclasses.replace(
        first,
        examples=(dataclasses.replace(answer, items=(item,)),),
        drift=drift,
    )
    page = publish(facts, tmp_path).read_text("utf-8")
    assert '<th scope="row">age</th><td>undefined</td>' in page
    assert "nan" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL).split("<main>")[1]


def test_a_run_that_reused_everything_keeps_the_cost_of_when_it_ran(first, tmp_path, no_plots):
    publish(first, tmp_path)
    before = (tmp_path / "report" / FIRST / "metrics.json").read_bytes()
    publish(first, tmp_path, timings=())
    assert (tmp_path / "report" / FIRST / "metrics.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "report").glob("2*")] == [FIRST]


def test_a_broken_report_of_an_older_run_is_named_and_costs_no_other(first, second, tmp_path, no_plots):
    publish(first, tmp_path)
    (tmp_path / "report" / FIRST / "metrics.json").write_text('{"facts": {"created_unix_s": 1}}')
    publish(second, tmp_path)
    runs = (tmp_path / "report" / "runs.html").read_text("utf-8")
    assert "1 run left a report" in runs
    assert f"Left out: {tmp_path / 'report' / FIRST / 'metrics.json'} cannot be read" in runs
    assert "funnel_version: Field required" in runs


def test_metrics_over_time_have_a_line_per_gate_and_warn_of_other_data(first, second, tmp_path):
    later = dataclasses.replace(second, data_fingerprint="another")
    publish(first, tmp_path)
    publish(later, tmp_path)
    runs = (tmp_path / "report" / "runs.html").read_text("utf-8")
    assert "These runs are on 2 different sets of tables" in runs
    readings = runs[runs.index("data-readings") :]
    assert readings.index("Recall@100&#34;,&#34;0.2512") < readings.index("Recall@100&#34;,&#34;0.3012")


def test_comparison_says_on_top_that_the_data_differ(first, second, no_plots):
    page = render_comparison(first, second)
    assert "These two runs are on different data: no difference below says which model is better." in page
    assert page.index("on different data") < page.index("</header>")
    for setting in ("users", "gates[retrieval/recall_at_100].min", "numpy", "Funnel"):
        assert f'<th scope="row">{setting}</th>' in page
    assert "12,345" in page and "12,346" in page


def test_what_can_be_compared_is_said_in_one_sentence(first, second):
    def sentence(**changes):
        return comparability(differences(first, dataclasses.replace(first, **changes)))

    assert "the same configuration: what differs below is code" in sentence(code_version="2")
    assert "another configuration" in sentence(config=second.config)
    assert "different data" in sentence(summary=second.summary)
    assert "different data" in sentence(data_fingerprint="another")
    assert "on the same data is unknown" in sentence(summary=None)
    assert "whether the configuration is the same is unknown" in sentence(config={})


def test_differences_within_the_intervals_are_not_coloured(first, no_plots):
    base = moved(first, 0.0)
    # Intervals are 0.01 wide to both sides: they meet up to a difference of 0.02.
    small, large = (render_comparison(base, moved(first, by)) for by in (0.015, 0.025))
    assert "+0.0150</td>" in small and "+0.0250</td>" in large
    assert '<td class="better"' not in small and '<td class="worse"' not in small
    # Of log loss and MAE the smaller is the better.
    assert large.count('<td class="better"') > large.count('<td class="worse"') > 0
    # On other data no difference, however large, tells which is better.
    unfair = render_comparison(base, dataclasses.replace(moved(first, 0.025), data_fingerprint="other"))
    assert "+0.0250</td>" in unfair
    assert '<td class="better"' not in unfair and '<td class="worse"' not in unfair


def test_slices_are_compared_largest_loss_first_and_a_missing_one_is_said(first, no_plots):
    figures = []
    for figure in first.models["retrieval"].figures:
        if figure.slice == "user_type = cold":
            continue
        loss = {"surface = home": 0.1, "surface = search": 0.02}.get(figure.slice, 0.0)
        figures.append(
            dataclasses.replace(figure, value=None if figure.value is None else figure.value - loss)
        )
    retrieval = dataclasses.replace(first.models["retrieval"], figures=tuple(figures))
    other = dataclasses.replace(
        first, created_unix_s=FIRST_UNIX_S + 1, models={**first.models, "retrieval": retrieval}
    )
    page = render_comparison(first, other)
    table = page[page.index("table-slices-retrieval") : page.index("table-slices-ranking")]
    places = [table.index(name) for name in ("surface = home", "surface = search", "user_type = cold")]
    assert places == sorted(places)
    assert "not measured" in table


def test_report_compares_output_directories_ids_and_folders(first, second, tmp_path, no_plots):
    publish(first, tmp_path)
    publish(second, tmp_path)
    out = tmp_path / "deep" / "compare.html"
    for a, b in ((FIRST, SECOND), (tmp_path / "report" / FIRST, tmp_path)):
        result = CliRunner().invoke(
            main, ["report", "--output-dir", str(tmp_path), "--compare", str(a), str(b), "--out", str(out)]
        )
        assert result.exit_code == 0, result.output
        assert "These two runs are on different data" in result.output
        assert f"comparison: {out}" in result.output
        assert f"Run {SECOND} against run {FIRST}" in out.read_text("utf-8")
        out.unlink()


def test_an_unknown_run_is_told_with_those_that_there_are(first, tmp_path, no_plots):
    publish(first, tmp_path)
    with pytest.raises(DataError, match=f"no report of a run 'yesterday'.*: {FIRST}"):
        history.find_run("yesterday", tmp_path / "report")


def test_a_run_is_not_compared_with_itself(first, tmp_path, no_plots):
    publish(first, tmp_path)
    result = CliRunner().invoke(main, ["report", "--compare", str(tmp_path), str(tmp_path)])
    assert result.exit_code == 1
    assert f"are the same run, {FIRST}" in result.output


def test_what_is_measured_later_stands_in_the_newest_run_alone_and_stays(first, second, tmp_path, no_plots):
    publish(first, tmp_path)
    publish(dataclasses.replace(second, leakage=None, missing={"leakage": "there is no file"}), tmp_path)
    report = tmp_path / "report"
    page = history.add_to_newest(report, leakage=LEAKAGE, load_test=LOAD_TEST)
    # One model after the other.
    for model in ("retrieval", "ranking"):
        history.add_to_newest(report, seeds={model: {f"{model}/score": (0.1, 0.2)}})
    assert page == report / "index.html"
    facts = read_facts(report / SECOND / "metrics.json")
    assert (facts.leakage, facts.load_test, facts.missing) == (LEAKAGE, LOAD_TEST, {})
    assert set(facts.seeds) == {"retrieval", "ranking"}
    assert "grpc://host:8500" in page.read_text("utf-8")
    assert read_facts(report / FIRST / "metrics.json").load_test is None
    # A run that reuses every component publishes the same run again.
    publish(second, tmp_path)
    assert read_facts(report / "metrics.json").load_test == LOAD_TEST


def test_nothing_is_added_where_no_run_left_a_report(tmp_path):
    with pytest.raises(DataError, match="no report"):
        history.add_to_newest(tmp_path, load_test=LOAD_TEST)
