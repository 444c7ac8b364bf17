"""One file a command, each a function that the command line calls after reading its arguments."""
