"""The version of cachec, which files that it writes carry. A source tree that is not installed has it, too."""

VERSION = "0.1.0"
