"""Carriers of keys and values."""
