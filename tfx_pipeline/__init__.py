"""TFX pipeline, its components, datasets and the command line."""
