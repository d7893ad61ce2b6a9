"""`python -m blockhess`: the command line, for environments whose scripts are not on the PATH."""

import sys

from blockhess.cli.main import main

sys.exit(main())
