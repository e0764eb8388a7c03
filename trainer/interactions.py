"""Explicit interactions of features: crosses (DCN-v2) and dot products of all pairs (DLRM).

Letters: B = rows, F = features, W_f = width of feature f, D = sum of the widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf
import tensorflow_recommenders as tfrs

from schema.errors import ConfigError, ShapeError
from trainer.body_config import InteractionConfig


class CrossNetwork(tf.keras.layers.Layer):
    """Crosses x_(l+1) = x_0 ⊙ (W x_l + b) + x_l of the concatenated features; W = U V where the rank is low.

    Source: Wang et al., WWW 2021 (DCN-v2), equations 1 and 2.
    """

    def __init__(self, config: InteractionConfig, **kwargs: object) -> None:
        """Makes the layer.

        Args:
          config: `num_layers`, and `rank` where the kind is "dcn_low_rank".
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self.rank = config.rank if config.kind == "dcn_low_rank" else None
        self.crosses = [
            # The library's default has the same spread for every width: wide inputs would grow in each cross.
            tfrs.layers.dcn.Cross(projection_dim=self.rank, kernel_initializer="glorot_uniform")
            for _ in range(config.num_layers)
        ]

    def build(self, input_shape: Sequence[tf.TensorShape]) -> None:
        """Checks that a low rank saves something."""
        width = sum(shape[-1] for shape in input_shape)
        if self.rank is not None and 2 * self.rank >= width:
            raise ConfigError(
                f"interactions.rank is {self.rank}, but the features are {width} wide in all: two matrices "
                f"of that rank are no smaller than a full one; choose less than {width / 2:g}, or kind 'dcn'"
            )
        super().build(input_shape)

    def call(self, features: Sequence[tf.Tensor], training: bool = False) -> tf.Tensor:
        """Encoded features, F × float32 [B, W_f], to float32 [B, D]; F may be 1."""
        first = tf.concat(features, axis=-1)
        crossed = first
        for cross in self.crosses:
            crossed = cross(first, crossed)
        return crossed


class DotProducts(tf.keras.layers.Layer):
    """The features and the dot products of all pairs of them, each feature projected to one width.

    Source: Naumov et al. 2019 (DLRM), section 2.1.3. There all embeddings have one width; the projections are
    what lets them differ.
    """

    def __init__(self, config: InteractionConfig, **kwargs: object) -> None:
        """Makes the layer.

        Args:
          config: `projection_width`.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self.width = config.projection_width
        self.dot = tfrs.layers.feature_interaction.DotInteraction()

    def build(self, input_shape: Sequence[tf.TensorShape]) -> None:
        """Makes a projection per feature.

        Raises:
          ShapeError: there are fewer than two features.
        """
        if len(input_shape) < 2:
            raise ShapeError(
                f"dot products need at least two features, got {len(input_shape)} of shape "
                f"{[tuple(shape) for shape in input_shape]}; pass them one by one and not concatenated"
            )
        self.projections = [tf.keras.layers.Dense(self.width) for _ in input_shape]
        super().build(input_shape)

    def call(self, features: Sequence[tf.Tensor], training: bool = False) -> tf.Tensor:
        """Encoded features, F × float32 [B, W_f], to float32 [B, D + F (F - 1) / 2]: features, then products.

        The product of features i > j stands at i (i - 1) / 2 + j of the products.
        """
        projected = [project(feature) for project, feature in zip(self.projections, features, strict=True)]
        return tf.concat([*features, self.dot(projected)], axis=-1)


def interaction(config: InteractionConfig) -> CrossNetwork | DotProducts | None:
    """The layer that the settings name, None for "none".

    It is called as `layer(features, training)` with the list of encoded features, float32 [B, W_f] each, in
    an order that never changes; crosses also take a list of one, the concatenated vector. It returns float32
    [B, D] (crosses) or [B, D + F (F - 1) / 2] (dot products). Both contain the features themselves, so that
    nothing needs to be added to them.

    With structure "stacked" the result is the body's input. With "parallel" the body reads the concatenated
    features, and the result is concatenated to each of the body's outputs (Wang et al., WWW 2021, figure 1).
    """
    if config.kind == "none":
        return None
    return DotProducts(config) if config.kind == "dlrm" else CrossNetwork(config)
