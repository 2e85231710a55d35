"""What the command line calls: calibrate, train, run, report."""
