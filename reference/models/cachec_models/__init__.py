"""Trained models and predictors for cachec, found by their names: ``cachec compile tiny-hunyuan``. Nothing here runs."""

VERSION = "0.1.0"  # cachec's own
