"""One set of conformance vectors for batch normalization, and what runs them against any backend.

The suite names no framework: it receives backends (`bnlayer.contract.Backend`). Terms, the runner's algorithm, the
bounds and the limits are in docs/conformance.md.
"""

from typing import Final

# Of the vectors' meaning: a changed expectation gets a new vector id, and a new number here.
SUITE: Final = "1.0"
