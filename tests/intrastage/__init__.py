"""Stages, what schedules them and what measures them."""
