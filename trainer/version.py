"""The release's version, in one place: setup.py and the changelog check read it as text."""

__version__ = "0.1.0"
