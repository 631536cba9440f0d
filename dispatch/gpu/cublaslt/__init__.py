"""cuBLASLt's algorithms as candidates of ``linear``: asked for, named by what they are, run by their bytes."""
