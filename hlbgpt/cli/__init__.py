"""The command line, the checks of settings, and `fit` from Python."""
