"""Defines ``torch.ops.dks.*`` where it is imported: what a process needs that loads an exported program.

Importing a generated package does the same, and brings the table that the program asks. In a process without that
table the framework's own operators serve, with a warning.
"""

from dks.dispatch import pool

pool.operators()
