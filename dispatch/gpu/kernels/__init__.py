"""Triton sources. Imported where they are compiled or interpreted, never while serving."""
