"""TFX pipeline, its components, datasets and the command line."""

import trainer  # noqa: F401  sets the Keras generation before anything here imports TensorFlow
