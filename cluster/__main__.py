"""`python -m medrl.cluster`: the command line where no console script is installed (a Ray job)."""

from medrl.cluster.cli import main

main()
