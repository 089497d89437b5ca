"""Speed and memory, each against a peer and as a ratio.

Run from the root of the repository: python -m benchmarks.NAME
"""
