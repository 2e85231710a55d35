"""Running the uncached model, and measuring how close a cached run comes."""
