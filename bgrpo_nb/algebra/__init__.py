"""The task: polynomials in prefix notation, verified by exact algebra; no torch.

- `polynomial`: prefix notation read and written, verdicts, equivalent inner polynomials
- `notation`: typed text, SymPy, LaTeX and HTML, to and from prefix notation
- `exact_decomposition`: every decomposition in one variable, without a policy
- `problems`: generate, read, write, filter, mix and split problems
"""
