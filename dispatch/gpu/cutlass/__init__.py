"""CUTLASS kernels of ``linear``: data, rendered, compiled with nvcc ahead of time, called through C."""
