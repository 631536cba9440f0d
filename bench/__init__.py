"""Benchmarks and the demo. Each prints a table and writes runs/<name>/result.json."""
