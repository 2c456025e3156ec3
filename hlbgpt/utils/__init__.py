"""Small helpers for every room: errors, files, clocks, hardware, the random seed."""
