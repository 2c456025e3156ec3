"""``python -m hlbgpt``: the same as the console command ``hlbgpt``."""

from hlbgpt.cli.main import main

main()
