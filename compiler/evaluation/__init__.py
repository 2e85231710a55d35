"""A bundle beside the uncached run, other methods and plain solvers: measured, in words, in plots, on a page."""
