"""The comparisons of docs/results.md: one script per table, with its controls. The library does not import them.

Run from the root of the repository: python -m experiments.NAME
"""
