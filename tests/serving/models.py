"""Tiny models with the exported signatures of docs/architecture.md; their rules can be redone by hand."""

from pathlib import Path

import tensorflow as tf
from tensorflow.python.data.experimental.ops import testing  # the only op that waits without computing

ITEM_IDS = [f"item{i}" for i in range(8)]
MAX_K = 8
TASKS = ("click", "watch_time")


def _text(rank: int, name: str) -> tf.TensorSpec:
    return tf.TensorSpec([None] * rank, tf.string, name=name)


QUERY = (
    _text(1, "user_id"),
    tf.TensorSpec([None], tf.float32, name="age"),
    tf.TensorSpec([None], tf.int64, name="event_time_unix_s"),
    _text(2, "history_item_ids"),
)


class Retrieval(tf.Module):
    """Returns the catalogue in order, without excluded items; scores 8, 7, 6, ... by place in the catalogue.

    The reason is the newest watched item. A user is known when the id starts with "known". The parity of an
    item is "even" or "odd"; a search fell back to an exact one when it allows only one of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.item_ids = tf.constant(ITEM_IDS)

    @tf.function(
        input_signature=[
            *QUERY,
            tf.TensorSpec([None], tf.int32, name="k"),
            _text(2, "exclude_item_ids"),
            _text(2, "allow_parity"),
        ]
    )
    def serve(self, user_id, age, event_time_unix_s, history_item_ids, k, exclude_item_ids, allow_parity):
        within = tf.debugging.assert_less_equal(k, MAX_K, message="k above the exported maximum")
        with tf.control_dependencies([within]):  # otherwise top_k may fail first, with a text of its own
            max_k = tf.reduce_max(k)
        scores = tf.range(len(ITEM_IDS), 0.0, -1.0)
        excluded = tf.reduce_any(self.item_ids[None, :, None] == exclude_item_ids[:, None, :], axis=2)
        parity = tf.constant(["even", "odd"] * (len(ITEM_IDS) // 2))
        free = tf.reduce_all(allow_parity == "", axis=1)
        allowed = tf.reduce_any(parity[None, :, None] == allow_parity[:, None, :], axis=2) | free[:, None]
        kept = tf.where(excluded | ~allowed, -1.0, scores[None, :])
        top_scores, top = tf.math.top_k(kept, max_k)
        is_item = (top_scores > 0) & (tf.range(max_k)[None, :] < k[:, None])
        length = tf.reduce_sum(tf.cast(history_item_ids != "", tf.int64), axis=1)
        # A missing value may stand anywhere in a list.
        places = tf.range(tf.shape(history_item_ids)[1])[None, :]
        last = tf.reduce_max(tf.where(history_item_ids != "", places, 0), axis=1)
        newest = tf.gather(history_item_ids, last, batch_dims=1)
        return {
            "item_ids": tf.where(is_item, tf.gather(self.item_ids, top), ""),
            "scores": tf.where(is_item, top_scores, 0.0),
            "reason_item_ids": tf.where(is_item, newest[:, None], ""),
            "user_is_known": tf.cast(tf.strings.substr(user_id, 0, 5) == "known", tf.int64),
            "history_length": length,
            "exact_fallback": tf.cast(~tf.reduce_all(allowed, axis=1), tf.int64),
        }


@tf.function(input_signature=[tf.TensorSpec([None], tf.int32, name="columns")])
def score_tasks(columns):
    """Whose weight stands in a column of `score_weights`, and that every task is declared with 1."""
    return {"tasks": tf.gather(tf.constant(TASKS), columns), "weights": tf.ones_like(columns, tf.float32)}


_WEIGHTS = tf.TensorSpec([None, len(TASKS)], tf.float32, name="score_weights")


class Ranking(tf.Module):
    """click = item number / 10, watch_time = age (0 when missing), score = their sum.

    The weights of the two tasks in the score are 1 where they are NaN. The pre-ranker prefers small numbers
    and would leave the ranker three.
    """

    @tf.function(input_signature=[*QUERY, _text(2, "candidate_item_ids"), _WEIGHTS])
    def weighted(self, user_id, age, event_time_unix_s, history_item_ids, candidate_item_ids, score_weights):
        tf.debugging.assert_equal(tf.reduce_any(score_weights < 0), False, "score_weights must be >= 0")
        outputs = self.serve(user_id, age, event_time_unix_s, history_item_ids, candidate_item_ids)
        weights = tf.where(tf.math.is_nan(score_weights), 1.0, score_weights)[:, None, :]
        score = tf.reduce_sum(weights * tf.stack([outputs[task] for task in TASKS], axis=2), axis=2)
        return {**outputs, "score": score}

    @tf.function(
        input_signature=[
            *QUERY,
            _text(2, "candidate_item_ids"),
            tf.TensorSpec([None], tf.int32, name="k"),
        ]
    )
    def pre_rank(self, user_id, age, event_time_unix_s, history_item_ids, candidate_item_ids, k):
        longest = tf.minimum(tf.reduce_max(k), tf.shape(candidate_item_ids)[1])
        clicks = self.serve(user_id, age, event_time_unix_s, history_item_ids, candidate_item_ids)["click"]
        scores = tf.where(candidate_item_ids != "", -clicks, -9.0)
        best, places = tf.math.top_k(scores, longest)
        is_kept = (best > -9.0) & (tf.range(longest) < k[:, None])
        ids = tf.gather(candidate_item_ids, places, batch_dims=1)
        return {
            "item_ids": tf.where(is_kept, ids, ""),
            "scores": tf.where(is_kept, best, 0.0),
            "num_kept": tf.fill(tf.shape(k), tf.constant(3, tf.int64)),
        }

    @tf.function(input_signature=[*QUERY, _text(2, "candidate_item_ids")])
    def serve(self, user_id, age, event_time_unix_s, history_item_ids, candidate_item_ids):
        is_item = candidate_item_ids != ""
        digits = tf.strings.substr(tf.where(is_item, candidate_item_ids, "item0"), 4, 1)
        click = tf.where(is_item, tf.strings.to_number(digits) / 10.0, 0.0)
        watch_time = tf.where(is_item, tf.where(tf.math.is_nan(age), 0.0, age)[:, None], 0.0)
        return {
            "click": click,
            "watch_time": watch_time,
            "score": click + watch_time,
            "item_is_known": tf.cast(is_item, tf.int64),
        }


class Funnel(tf.Module):
    """Retrieval and Ranking in one; the weights of the two tasks in the score are 1 where they are NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.retrieval = Retrieval()
        self.ranking = Ranking()

    @tf.function(
        input_signature=[
            *Retrieval.serve.input_signature,
            tf.TensorSpec([None], tf.int32, name="num_candidates"),
            _WEIGHTS,
        ]
    )
    def serve(
        self,
        user_id,
        age,
        event_time_unix_s,
        history_item_ids,
        k,
        exclude_item_ids,
        allow_parity,
        num_candidates,
        score_weights,
    ):
        query = (user_id, age, event_time_unix_s, history_item_ids)
        found = self.retrieval.serve(*query, num_candidates, exclude_item_ids, allow_parity)
        ranked = self.ranking.serve(*query, found["item_ids"])
        outputs = tf.stack([ranked[task] for task in TASKS], axis=2)
        weights = tf.where(tf.math.is_nan(score_weights), 1.0, score_weights)
        ranked["score"] = tf.reduce_sum(outputs * weights[:, None, :], axis=2)
        max_k = tf.reduce_max(k)
        _, best = tf.math.top_k(tf.where(found["item_ids"] != "", ranked["score"], -1.0), max_k)
        wanted = tf.range(max_k)[None, :] < k[:, None]

        def of_best(values):
            chosen = tf.gather(values, best, batch_dims=1)
            return tf.where(wanted, chosen, tf.zeros_like(chosen))

        return {
            **{name: of_best(values) for name, values in ranked.items()},
            "item_ids": of_best(found["item_ids"]),
            "retrieval_score": of_best(found["scores"]),
            "reason_item_ids": of_best(found["reason_item_ids"]),
            **{name: found[name] for name in ("user_is_known", "history_length", "exact_fallback")},
        }


class Echo(tf.Module):
    """One model for what the API must carry unchanged; `calls` counts runs, warm-up included."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self.version = version
        self.calls = tf.Variable(0, dtype=tf.int64)

    @tf.function(
        input_signature=[
            _text(1, "text"),
            tf.TensorSpec([None], tf.int64, name="number"),
            tf.TensorSpec([None, None], tf.float32, name="floats"),
        ]
    )
    def serve(self, text, number, floats):
        return {"text": text, "text_bytes": text, "number": number, "floats": floats}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def half(self, x):
        return {"y": x / 2}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def which_version(self, x):
        self.calls.assign_add(1)
        ones = tf.ones_like(x, tf.int64)
        return {"version": ones * self.version, "calls": ones * self.calls}

    @tf.function(input_signature=[tf.TensorSpec([], tf.float32, name="seconds")])
    def sleep(self, seconds):
        one = tf.data.Dataset.from_tensors(seconds)
        slow = one.apply(testing.sleep(tf.cast(seconds * 1e6, tf.int64)))
        return {"done": slow.take(1).reduce(0.0, lambda _, value: value)}


def fingerprint(**hashes: str):
    """The signature that tells the hashes of a bundle's parts."""

    @tf.function(input_signature=[_text(1, "parts")])
    def fingerprints(parts):
        found = tf.fill(tf.shape(parts), "")
        for name, value in hashes.items():
            found = tf.where(parts == name, value, found)
        return {"fingerprints": found}

    return fingerprints


def save(model: tf.Module, path: Path, **signatures) -> Path:
    """Saves beside the path and renames, so that a polling server sees whole versions only."""
    partial = path.with_name(f".{path.name}")
    tf.saved_model.save(model, str(partial), signatures=signatures or {"serving_default": model.serve})
    partial.rename(path)
    return path


def save_echo(path: Path, version: int) -> Path:
    model = Echo(version)
    return save(
        model,
        path,
        serving_default=model.serve,
        half=model.half,
        which_version=model.which_version,
        sleep=model.sleep,
    )


def save_examples_model(path: Path) -> Path:
    """A TF 1 SavedModel of tf.Examples with the float feature "x", which no TF 2 exporter writes any more.

    classify: classes low and high with the scores 1 - x and x; scores: the same without classes; regress: 2x;
    native: as regress, with the method name that TF 2 gives every signature; other_input: as regress, from an
    input tensor of its own; labels: a class that is not UTF-8.
    """
    methods = tf.compat.v1.saved_model.signature_constants
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:

        def x_of(serialized):
            features = {"x": tf.io.FixedLenFeature([], tf.float32), "y": tf.io.VarLenFeature(tf.string)}
            return tf.io.parse_example(serialized, features)["x"][:, None]

        def signature(inputs, outputs, method):
            build = tf.compat.v1.saved_model.build_tensor_info
            return tf.compat.v1.saved_model.build_signature_def(
                {"inputs": build(inputs)}, {name: build(tensor) for name, tensor in outputs.items()}, method
            )

        inputs = tf.compat.v1.placeholder(tf.string, [None], name="serialized")
        other = tf.compat.v1.placeholder(tf.string, [None], name="other")
        x = x_of(inputs)
        scores = tf.concat([1 - x, x], axis=1)
        classes = tf.tile([["low", "high"]], [tf.shape(x)[0], 1])
        bad_labels = tf.tile(tf.constant([[b"\xff"]]), [tf.shape(x)[0], 1])
        classify, regress = methods.CLASSIFY_METHOD_NAME, methods.REGRESS_METHOD_NAME
        builder = tf.compat.v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            signature_def_map={
                "classify": signature(inputs, {"classes": classes, "scores": scores}, classify),
                "scores": signature(inputs, {"scores": scores}, classify),
                "labels": signature(inputs, {"classes": bad_labels}, classify),
                "regress": signature(inputs, {"outputs": x * 2}, regress),
                "native": signature(inputs, {"outputs": x * 2}, methods.PREDICT_METHOD_NAME),
                "other_input": signature(other, {"outputs": x_of(other) * 2}, regress),
            },
        )
        builder.save()
    return path
