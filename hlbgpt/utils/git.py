"""The revision of this code."""

import subprocess
from pathlib import Path


def git_revision() -> str | None:
    """The commit of this code, with `-dirty` if files differ from it; None outside a checkout."""
    here = Path(__file__)

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(here.parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside the checkout of another project.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
