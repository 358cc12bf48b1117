"""`fuse bench training`: fused against serial training steps, real and emulated."""
