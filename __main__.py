"""`python -m foldkernels` is the `foldkernels` command."""

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
