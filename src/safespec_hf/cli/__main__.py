"""`python -m safespec_hf.cli`, for `accelerate launch`."""

from . import main

if __name__ == "__main__":
    main()
