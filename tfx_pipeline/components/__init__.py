"""Components of the pipeline that TFX does not bring itself."""
