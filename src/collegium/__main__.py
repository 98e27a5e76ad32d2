"""Run the command line as `python -m collegium`, also under torchrun and accelerate."""

from collegium.cli import main

if __name__ == "__main__":
    main()
