"""The command line: words, options, exit codes. A veneer over the stages.

Exit codes: 0 success, 1 an error of ours (one paragraph), 2 usage, 3 a check that found something.
"""

from featprobe.cli.main import main

__all__ = ["main"]
