"""How fast bnlayer is: ratios to what it replaces, measured side by side. `python -m benchmarks --help`."""
