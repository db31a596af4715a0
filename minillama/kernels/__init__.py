"""Kernels written by hand, once, for every backend: in tinygrad's UOps, rendered as Metal, CUDA, OpenCL or C.

Each stands beside a plain-tensor twin that computes the same; tests hold the two equal, and whoever wants to
understand a kernel reads its twin first. How a kernel is spread over threads is decided in `tuning.py`, apart from
what it computes. The UOp interface of tinygrad is marked alpha: every use of it is in this package.
"""
