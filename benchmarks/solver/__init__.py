"""`fuse bench solver`: schedules against their bounds and published ones."""
