"""The vector tool: cases in, vectors out. `python -m bnlayer_conformance.authoring --help`.

Needs mpmath and jsonschema (extra `conformance`); running the vectors needs neither.
"""
