"""What stands where a pipeline's transformer was: the unmodified pipeline calls it, and engines answer."""
