"""`fuse bench rollout`: rollouts under each migration policy, and generation against that of others."""
