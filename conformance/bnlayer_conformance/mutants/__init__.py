"""Mistakes the suite must catch: a correct base, and mutants that differ from it by one line each."""
