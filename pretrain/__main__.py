"""`python -m pretrain`, so that launchers can start the command line."""

from pretrain.cli import main

if __name__ == "__main__":
    main()
