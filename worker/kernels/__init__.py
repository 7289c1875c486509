"""Triton kernels, one a file beside its launcher. Imported only where the device is a GPU: Triton is large. Decode thread.

Rules every kernel here keeps: no launcher reads the device (all of them can be captured in a CUDA graph); values
are widened to fp32 when loaded and rounded when stored; addresses into KV memory are 64-bit. Under
`TRITON_INTERPRET=1` the same code runs on CPU tensors, which is how it is tested without a GPU.
"""
