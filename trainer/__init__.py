"""Models, features and metrics; needs Keras 2, which TensorFlow 2.16 reads from an environment variable."""

import os
import sys

if "tensorflow" in sys.modules and os.environ.get("TF_USE_LEGACY_KERAS") != "1":
    raise ImportError(
        "TensorFlow was imported before TF_USE_LEGACY_KERAS=1 was set; "
        "set it in the environment, or import trainer first."
    )
os.environ["TF_USE_LEGACY_KERAS"] = "1"
