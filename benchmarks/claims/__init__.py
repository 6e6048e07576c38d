"""The paper's claims, measured on the embedded model: see `benchmarks/claims.py` for the command."""
