"""Leakage linter: does a finished run hold anything that nobody could have known at the time?"""
