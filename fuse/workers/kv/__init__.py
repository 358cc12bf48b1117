"""How a migrating sample's KV goes from one engine's process to another's."""
