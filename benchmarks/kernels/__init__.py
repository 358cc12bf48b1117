"""`fuse bench kernels`: native kernels against their references and the machine."""
