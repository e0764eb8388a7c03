"""Real TFMA runs of tiny saved models, checked against the slow oracles on the same rows."""

import math
import pickle
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.contract import TaskKind, TaskSpec
from schema.errors import ConfigError
from tests import oracles
from trainer import metrics

KS = (1, 3, 8)
LIST_LENGTH = 8
ITEMS = [f"item-{i}" for i in range(30)]
COLD_ITEMS = set(ITEMS[:15])
TASKS = (
    TaskSpec(name="click", label="is_click", kind=TaskKind.BINARY),
    TaskSpec(name="watch", label="watch_time_s", kind=TaskKind.WATCH_TIME),
)
# Served lists come in as float32 predictions; sums of 40 of them agree with float64 oracles to this.
TOLERANCE = 1e-6


def user_rows():
    """User states: a served list, held-out positives (some in the list, for some users none), a surface."""
    rng = np.random.default_rng(11)
    rows = []
    for user in range(40):
        ranked = rng.permutation(ITEMS)[: rng.integers(4, LIST_LENGTH + 1)].tolist()
        positives = rng.choice([*ranked[:2], *ITEMS], size=rng.integers(0, 4)).tolist() if user % 5 else None
        cold = [item for item in positives or [] if item in COLD_ITEMS]
        row = {"ranked": ranked, "positives": positives, "surface": "feed" if user % 3 else "search"}
        rows.append(row | {"cold_test_item_ids": cold or None})
    return rows


def impression_rows():
    """Interactions of 7 users; predictions on a coarse grid, so that ties occur; some labels are missing."""
    rng = np.random.default_rng(12)
    rows = []
    for row in range(45):
        watch = float(rng.integers(0, 6)) * 10
        rows.append(
            {
                "user_id": f"user-{rng.integers(7)}",
                # Whole batches without a click label, and single rows without a watch time.
                "is_click": None if row < 10 or row % 11 == 0 else float(rng.random() < 0.4),
                "watch_time_s": [] if row % 13 == 0 else watch,
                "p_click": float(np.float32(rng.integers(1, 9) / 10)),
                "p_watch": float(np.float32(watch / 2 + rng.integers(0, 30))),
                "surface": "feed" if row % 2 else "search",
                # No label of a task, and not known of some rows.
                "chosen": None if row % 9 == 0 else float(row % 3 != 0),
            }
        )
    return rows


def write_examples(path, rows):
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in rows:
            example = tf.train.Example()
            for name, value in row.items():
                if value is None:
                    continue  # A missing value can be an absent feature as well as an empty list.
                values = value if isinstance(value, list) else [value]
                feature = example.features.feature[name]
                if name in ("surface", "user_id", "ranked", "positives", "cold_test_item_ids"):
                    feature.bytes_list.value.extend(v.encode() for v in values)
                else:
                    feature.float_list.value.extend(values)
            writer.write(example.SerializeToString())


def save_retrieval_model(path, reverse=False, collapsed=False):
    """Serves the list that stands in the example, padded to the exported maximum; backwards if `reverse`.

    A collapsed model serves one list to everybody.
    """
    import tensorflow as tf

    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "examples")])
    def serving_examples(examples):
        lists = tf.io.parse_example(examples, {"ranked": tf.io.RaggedFeature(tf.string)})["ranked"]
        item_ids = (lists[:, ::-1] if reverse else lists).to_tensor("", shape=[None, LIST_LENGTH])
        if collapsed:
            item_ids = tf.tile(tf.constant([ITEMS[:LIST_LENGTH]]), [tf.shape(item_ids)[0], 1])
        return {"item_ids": item_ids, "scores": tf.zeros(tf.shape(item_ids))}

    tf.saved_model.save(module, str(path), signatures={"serving_examples": serving_examples})


def save_ranking_model(path):
    """Serves the predictions that stand in the example."""
    import tensorflow as tf

    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "examples")])
    def serving_examples(examples):
        names = ("p_click", "p_watch")
        parsed = tf.io.parse_example(examples, {n: tf.io.FixedLenFeature([], tf.float32) for n in names})
        return {
            "click": parsed["p_click"],
            "watch": parsed["p_watch"],
            "score": parsed["p_click"] + parsed["p_watch"],
        }

    tf.saved_model.save(module, str(path), signatures={"serving_examples": serving_examples})


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """All that needs TFMA, once: two retrieval models against each other, and one ranking model alone."""
    import tensorflow_model_analysis as tfma

    from tfx_pipeline import tfma_metrics

    folder = tmp_path_factory.mktemp("evaluation")
    write_examples(folder / "users.tfrecord", user_rows())
    write_examples(folder / "impressions.tfrecord", impression_rows())
    save_retrieval_model(folder / "good")
    save_retrieval_model(folder / "bad", reverse=True)
    save_retrieval_model(folder / "collapsed", collapsed=True)
    save_ranking_model(folder / "ranking")

    def run(name, config, data, models):
        config = tfma.utils.update_eval_config_with_defaults(
            config, has_baseline="baseline" in models, rubber_stamp=True
        )
        loaded = [
            tfma.default_eval_shared_model(str(folder / path), model_name=model_name, eval_config=config)
            for model_name, path in models.items()
        ]
        tfma.run_model_analysis(
            eval_shared_model=loaded,
            eval_config=config,
            extractors=tfma_metrics.custom_extractors(loaded, config, None),
            data_location=str(folder / data),
            output_path=str(folder / name),
        )
        return str(folder / name)

    retrieval = tfma_metrics.retrieval_eval_config("positives", KS, slices=[["surface"]])
    ranking = tfma_metrics.ranking_eval_config(TASKS, "chosen", slices=[["surface"]])
    two_models = run("two", retrieval, "users.tfrecord", {"candidate": "bad", "baseline": "good"})
    alone = run("alone", ranking, "impressions.tfrecord", {"": "ranking"})
    plain = tfma_metrics.retrieval_eval_config("positives", KS)
    collapsed = run("one_list", plain, "users.tfrecord", {"": "collapsed"})
    return types.SimpleNamespace(
        module=tfma_metrics, tfma=tfma, two_models=two_models, alone=alone, collapsed=collapsed
    )


def table(values):
    return {(value.slice, value.output, value.metric): value.value for value in values}


SLICES = [
    pytest.param(None, id="overall"),
    pytest.param("feed", id="feed"),
    pytest.param("search", id="search"),
]


@pytest.mark.parametrize("surface", SLICES)
@pytest.mark.parametrize("model_name", ["candidate", "baseline"])
def test_retrieval_figures_equal_the_oracle_per_model_and_slice(evaluation, model_name, surface):
    figures = table(evaluation.module.read_metrics(evaluation.two_models, model_name))
    slice_key = (("surface", surface),) if surface else ()
    rows = [row for row in user_rows() if surface in (None, row["surface"])]
    for k in KS:
        for name in ("recall", "precision", "ndcg", "hit_rate", "mrr", "map"):
            expected = oracles.macro_mean(
                [
                    getattr(oracles, f"{name}_at_k")(
                        row["ranked"][::-1] if model_name == "candidate" else row["ranked"],
                        row["positives"] or [],
                        k,
                    )
                    for row in rows
                ]
            )
            assert figures[slice_key, "", f"{name}_at_{k}"] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("surface", SLICES)
def test_cold_items_and_distinct_items_equal_the_oracle(evaluation, surface):
    figures = table(evaluation.module.read_metrics(evaluation.two_models, "baseline"))
    slice_key = (("surface", surface),) if surface else ()
    rows = [row for row in user_rows() if surface in (None, row["surface"]) and row["positives"]]
    cold = [[item for item in row["positives"] if item in COLD_ITEMS] for row in rows]
    assert 0 < sum(map(bool, cold)) < len(rows)
    for k in KS:
        recalls = [
            oracles.recall_at_k(row["ranked"], wanted, k) for row, wanted in zip(rows, cold, strict=True)
        ]
        expected = oracles.macro_mean(recalls)
        assert figures[slice_key, "", f"cold_item_recall_at_{k}"] == pytest.approx(expected, abs=TOLERANCE)
    assert figures[slice_key, "", "num_cold_item_queries"] == sum(map(bool, cold))
    distinct = oracles.distinct_items_at_k([row["ranked"] for row in rows], KS[0])
    assert figures[slice_key, "", f"distinct_items_at_{KS[0]}"] == distinct
    assert figures[slice_key, "", "num_positive_items"] == len({i for row in rows for i in row["positives"]})


def test_a_model_that_recommends_the_same_to_everybody_has_one_distinct_item(evaluation):
    figures = table(evaluation.module.read_metrics(evaluation.collapsed))
    assert figures[(), "", "distinct_items_at_1"] == 1


def test_users_without_positives_are_not_counted(evaluation):
    figures = table(evaluation.module.read_metrics(evaluation.two_models))
    rows = user_rows()
    num_judged = sum(bool(row["positives"]) for row in rows)
    assert 0 < num_judged < len(rows)
    assert figures[(), "", "num_queries"] == num_judged


def weighted_pairwise_loss(watches):
    """By the oracle, over the rows of which it is known whether they were chosen."""
    known = [row for row in watches if row["chosen"] is not None]
    names = ("chosen", "watch_time_s", "p_watch", "user_id")
    return oracles.weighted_pairwise_loss(*([row[name] for row in known] for name in names))


@pytest.mark.parametrize("surface", SLICES)
def test_ranking_figures_equal_the_oracles_per_task_and_slice(evaluation, surface):
    figures = table(evaluation.module.read_metrics(evaluation.alone))
    slice_key = (("surface", surface),) if surface else ()
    rows = [row for row in impression_rows() if surface in (None, row["surface"])]
    clicks = [row for row in rows if row["is_click"] is not None]
    watches = [row for row in rows if row["watch_time_s"] != []]
    labels, predictions = [row["is_click"] for row in clicks], [row["p_click"] for row in clicks]
    times, predicted_times = [row["watch_time_s"] for row in watches], [row["p_watch"] for row in watches]
    expected = {
        ("click", "auc"): oracles.xauc(labels, predictions),
        ("click", "gauc"): oracles.gauc(labels, predictions, [row["user_id"] for row in clicks]),
        ("click", "log_loss"): oracles.log_loss(labels, predictions),
        ("click", "normalised_entropy"): oracles.normalised_entropy(labels, predictions),
        ("click", "ece"): oracles.ece(labels, predictions, num_bins=20),
        ("click", "num_examples"): len(clicks),
        ("watch", "mae"): oracles.mae(times, predicted_times),
        ("watch", "xauc"): oracles.xauc(times, predicted_times),
        ("watch", "weighted_pairwise_loss"): weighted_pairwise_loss(watches),
        ("watch", "num_examples"): len(watches),
    }
    assert not any(math.isnan(value) for value in expected.values())
    found = {key[1:]: value for key, value in figures.items() if key[0] == slice_key}
    assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("surface", SLICES)
def test_figures_equal_those_of_the_offline_commands(evaluation, surface):
    slice_key = (("surface", surface),) if surface else ()

    def of_slice(eval_result_dir, model_name="candidate"):
        figures = table(evaluation.module.read_metrics(eval_result_dir, model_name))
        return {key[1:]: value for key, value in figures.items() if key[0] == slice_key}

    users = [row for row in user_rows() if surface in (None, row["surface"])]
    padded = [row["ranked"] + [""] * (LIST_LENGTH - len(row["ranked"])) for row in users]
    found = of_slice(evaluation.two_models, "baseline")
    hits = metrics.match_positives(padded, [row["positives"] or [] for row in users])
    offline = metrics.retrieval_metrics(*hits, KS)
    assert len(offline) == len(KS) * len(metrics.RETRIEVAL_METRICS)
    for name, values in offline.items():
        assert found["", name] == pytest.approx(metrics.macro_mean(values), abs=TOLERANCE), name

    found = of_slice(evaluation.alone)
    for task, prediction in zip(TASKS, ("p_click", "p_watch"), strict=True):
        rows = [row for row in impression_rows() if surface in (None, row["surface"])]
        rows = [row for row in rows if row[task.label] not in (None, [])]
        columns = [[row[name] for row in rows] for name in (task.label, prediction, "user_id")]
        columns.append([math.nan if row["chosen"] is None else row["chosen"] for row in rows])
        offline = metrics.ranking_metrics(task.kind, *columns)
        assert tuple(offline) == metrics.RANKING_METRICS[task.kind]
        for name, value in offline.items():
            assert found[task.name, name] == pytest.approx(value, abs=TOLERANCE), (task.name, name)


@given(seed=st.integers(0, 2**32 - 1), num_workers=st.integers(1, 6))
def test_figures_do_not_depend_on_how_beam_splits_the_rows(evaluation, seed, num_workers):
    """Bundles of any size on any worker, merged in any order: what batch size and Beam mode can change."""
    rng = np.random.default_rng(seed)
    judges = [
        evaluation.module._GatherAndJudge([*metrics.RANKING_METRICS[kind], "num_examples"], kind)
        for kind in (TaskKind.BINARY, TaskKind.WATCH_TIME)
    ]
    rows = [
        (
            row["is_click"],
            row["p_click"],
            evaluation.module._hash_of(row["user_id"].encode()),
            math.nan if row["chosen"] is None else row["chosen"],
        )
        for row in impression_rows()
        if row["is_click"] is not None
    ]
    lists = evaluation.module._SumUpQueries([*"abcd", *(f"other-{i}" for i in range(4))])
    queries = [
        evaluation.module._JudgedQuery(np.array([i / 7, np.nan if i % 3 else i, i % 2, i]), {i % 5}, {i})
        for i in range(20)
    ]
    for combiner, elements in (*((judge, rows) for judge in judges), (lists, queries)):
        expected = combiner.create_accumulator()
        for element in elements:
            expected = combiner.add_input(expected, element)
        parts = [combiner.create_accumulator() for _ in range(num_workers)]
        for place in rng.permutation(len(elements)):
            worker = rng.integers(num_workers)
            parts[worker] = combiner.add_input(parts[worker], elements[place])
        merged = combiner.merge_accumulators([pickle.loads(pickle.dumps(part)) for part in parts])
        assert combiner.extract_output(merged) == pytest.approx(
            combiner.extract_output(expected), abs=1e-12, nan_ok=True
        )


def test_predictions_that_are_not_numbers_make_a_task_undefined_and_stop_nothing(evaluation):
    names = [*metrics.RANKING_METRICS[TaskKind.BINARY], "num_examples"]
    judge = evaluation.module._GatherAndJudge(names, TaskKind.BINARY)
    rows = judge.create_accumulator()
    for row in ((1.0, 0.5, 1, 1.0), (0.0, math.nan, 1, 0.0), (0.0, 0.1, 2, 0.0)):
        rows = judge.add_input(rows, row)
    *values, num_examples = judge.extract_output(rows).values()
    assert len(values) == len(names) - 1 and all(math.isnan(value) for value in values)
    assert num_examples == 3


def test_only_labelled_examples_and_features_that_metrics_read_reach_the_model(evaluation):
    import pyarrow as pa

    key, raw = evaluation.tfma.ARROW_RECORD_BATCH_KEY, evaluation.tfma.constants.ARROW_INPUT_COLUMN
    columns = {
        "click": [[1.0], None, [], None],
        "watch": [None, None, [], [7.0]],
        "user_id": [[b"a"], [b"b"], [b"c"], [b"d"]],
        "country": [[b"x"]] * 4,
        raw: [[b"0"], [b"1"], [b"2"], [b"3"]],
    }

    def judged(rows, labels):
        batch = pa.RecordBatch.from_pydict({name: values[rows] for name, values in columns.items()})
        return [
            e[key].to_pydict() for e in evaluation.module._judged({key: batch}, labels, {*labels, "user_id"})
        ]

    (both,) = judged(slice(4), {"click", "watch"})
    assert both == {
        "click": [[1.0], None],
        "watch": [None, [7.0]],
        "user_id": [[b"a"], [b"d"]],
        raw: [[b"0"], [b"3"]],
    }
    assert judged(slice(1, 3), {"click", "watch"}) == []
    assert judged(slice(4), {"another"}) == []


def test_evaluation_of_one_model_has_no_baseline_figures(evaluation):
    assert evaluation.module.read_metrics(evaluation.alone, "baseline") == []


def test_wrong_configuration_is_refused(evaluation):
    module = evaluation.module
    with pytest.raises(ConfigError, match="cut-offs"):
        module.retrieval_eval_config("positives", [])
    with pytest.raises(ConfigError, match="no task"):
        module.ranking_eval_config([], "chosen")
