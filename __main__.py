"""`python -m rotoboa` is `rotoboa`."""

from .pipeline.cli.app import main

if __name__ == "__main__":
    main()
