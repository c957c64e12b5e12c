"""``python -m halfbyte``, the form that ``accelerate launch -m`` runs."""

import sys

from halfbyte.cli import main

if __name__ == "__main__":
    sys.exit(main())
