"""Schedules that run several models at once on the same ranks: constructions, searches and the solver over them."""
