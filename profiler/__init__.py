"""Offline measurement: sweep configs, benchmarking, the Parquet store, dks-profile."""
