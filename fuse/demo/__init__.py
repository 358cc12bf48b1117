"""The embedded demonstration: a small model learns to add numbers, from nothing but this package."""
