"""Schedules and coefficients as pure numbers, and their lowering to programs. No model, no torch graph."""
