"""Running the uncached model, recording what fits need, and measuring how close a run comes. Knows no method."""
