"""`fuse bench gpu`: what only a GPU can show, checked without Ray on one of them; with tiny shapes on a CPU."""
