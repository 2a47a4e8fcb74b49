"""The task: polynomials in prefix notation, verified by exact algebra; no torch."""
