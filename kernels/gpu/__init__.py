"""The three products on a GPU: Triton kernels, 2:4, and what they would cost where nothing was measured."""
