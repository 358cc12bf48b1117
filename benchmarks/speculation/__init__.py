"""Speculative decoding: drafts against plain decoding."""
