"""Policies meet polynomials: search, verify, filter, evaluate, decompose."""
