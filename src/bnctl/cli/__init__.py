"""The command line: options, rendering, progress."""
