"""``python -m hlbgpt``: the same as the console command ``hlbgpt``."""

from hlbgpt.cli import main

main()
