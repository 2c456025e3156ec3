"""Small things that every room may use: errors, files, clocks, hardware, the seed."""
