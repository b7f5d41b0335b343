"""`python -m vla_autoprune.cli`: the same as `vla-autoprune`."""

from vla_autoprune.cli import main

main()
