"""Workers, what they carry, and the Ray clusters that they live in."""
