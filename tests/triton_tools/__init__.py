"""Tools that prove Triton kernels right without a GPU.

`interpreter`: the interpreter with tensor-core arithmetic. `checker`: memory errors and races.
`gate`: registers, stack, shared memory and instructions of every shipped kernel, per architecture.
"""
