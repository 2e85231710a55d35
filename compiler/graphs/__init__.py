"""From a model to the graphs that engines are built from: capture, prepare, export, verify, build."""
