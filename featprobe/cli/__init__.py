"""The command line: words, options, exit codes. A veneer over the stages.

Exit codes: 0 success, 1 an error of ours (one paragraph), 2 a wrong value or option, 3 a check that found something,
130 Ctrl-C.
"""

import sys

try:
    from featprobe.cli.main import main
except KeyboardInterrupt:
    sys.stderr.write("featprobe: Stopped by Ctrl-C. Nothing was begun.\n")
    raise SystemExit(130) from None

__all__ = ["main"]
