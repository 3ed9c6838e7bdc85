"""The reference's ops, fast: ``cpu`` is Numba."""
