"""How weights move from the processes that train to those that compute by them, a bucket at a time.

The sender writes a bucket into memory that processes on its host reach: pages of the system's on CPUs
(`shared_memory`), the device's own on GPUs (`cuda_ipc`). To other hosts the same memory is broadcast (`broadcast`).
What a receiver finds is the same to the bit whichever way it came.
"""
