"""Runs CUDA kernels on the CPU: a PTX interpreter, and a CUDA runtime that launches by it.

`Device` is a GPU in this process, for every library built by nvcc that is loaded after it. What PTX
says is executed and checked on every access; what comes after PTX (registers, occupancy, speed,
wgmma, TMA, a weak order of memory) is not modelled: see docs/without_a_gpu.md.

Read in this order: parser, formats, arithmetic, conversions, memory, races, transfers, warps,
operands, program, machine, runtime.
"""
