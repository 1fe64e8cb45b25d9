""" python -m timm_sot """
import sys

from .cli import main

sys.exit(main())
