"""The reference model tiny-flux: its dataset, training and scores. Not part of the package."""
