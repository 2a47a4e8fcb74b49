"""Many runs: planned, carried out, read, compared, reported."""
