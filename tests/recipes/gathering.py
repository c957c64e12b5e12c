"""`halfbyte` whose trainers log as TRL does: every figure is gathered while the loss is computed."""

import sys

from halfbyte import cli
from halfbyte.trainer import weighted_figures

weighted_figures._MEASURES.clear()
sys.exit(cli.main(sys.argv[1:]))
