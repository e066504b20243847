"""`python -m rankwise.cli`, which torchrun needs."""

from rankwise.cli import main

main()
