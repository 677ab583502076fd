"""`python -m graphopt`: the command line, where the console script is not on the path."""

from graphopt.cli import main

if __name__ == "__main__":
    main()
