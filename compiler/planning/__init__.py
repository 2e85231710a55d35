"""What a user asks of a level, and the search, fit and measurement that serve it."""
