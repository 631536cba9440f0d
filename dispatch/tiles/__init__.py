"""CPU kernels generated from tile configurations.

A ``Unit`` is one generated C++ function: a hand-written template of this folder's headers with the constants of
one tile configuration. ``build`` compiles units, where something is measured or generated; ``library`` finds
compiled ones, and is all that a serving process uses. The C interface is ``abi.h``.
"""
