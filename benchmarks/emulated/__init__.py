"""Emulated devices: the real driver, controller, policies and executor over workers that wait as long as work takes."""
