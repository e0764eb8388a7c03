"""The catalogue that the benchmark of the one-call funnel makes up."""

import tensorflow as tf

from benchmarks.funnel_call import _larger


def item(item_id: str, tag: str, price: float) -> bytes:
    example = tf.train.Example()
    example.features.feature["item_id"].bytes_list.value.append(item_id.encode())
    example.features.feature["tag"].bytes_list.value.append(tag.encode())
    example.features.feature["price"].float_list.value.append(price)
    return example.SerializeToString()


def test_a_larger_catalogue_begins_with_the_items_of_the_run_and_draws_the_features_of_others_from_them() -> (
    None
):
    known = {"a": item("a", "red", 1.0), "b": item("b", "blue", 2.0), "c": item("c", "green", 3.0)}
    made = _larger(list(known.values()), 50)
    assert list(made)[:4] == ["a", "b", "c", "made-3"] and len(made) == 50
    examples = {name: tf.train.Example.FromString(value).features.feature for name, value in made.items()}
    values = {
        name: (e["item_id"].bytes_list.value[0], e["tag"].bytes_list.value[0], e["price"].float_list.value[0])
        for name, e in examples.items()
    }
    assert [values[name] for name in "abc"] == [
        (b"a", b"red", 1.0),
        (b"b", b"blue", 2.0),
        (b"c", b"green", 3.0),
    ]
    others = [values[f"made-{number}"] for number in range(3, 50)]
    assert [name for name, *_ in others] == [b"made-%d" % number for number in range(3, 50)]
    # Each feature by itself: all nine pairs come up.
    assert len({(tag, price) for _, tag, price in others}) == 9
