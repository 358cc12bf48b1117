"""`fuse bench iteration`: whole PPO iterations, with and without fusion, and TRL's beside them."""
