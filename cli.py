"""Run the command line from a checkout: `python cli.py segment …`."""

from wsi_pipeline.cli import main

if __name__ == "__main__":
    main()
