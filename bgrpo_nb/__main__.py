"`python -m bgrpo_nb COMMAND ...` is `bgrpo COMMAND ...`, where the script is not on the path"
import sys

from bgrpo_nb.cli import main

if __name__ == "__main__": sys.exit(main())
