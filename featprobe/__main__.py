"""`python -m featprobe`, for torchrun."""

from featprobe.cli import main

main()
