"""How fast every backend is, as ratios to what it replaces: `python -m benchmarks`."""
