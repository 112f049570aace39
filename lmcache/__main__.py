"""`python -m lmcache` is the command line."""

from lmcache.cli.main import main

if __name__ == "__main__":
    main()
