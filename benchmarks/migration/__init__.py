"""`fuse bench migration`: the pause of a sample that moves between engines."""
