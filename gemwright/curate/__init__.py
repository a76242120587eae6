"""Curating: raw text and chat logs -> what may be learnt from. The stages are in `pipeline`."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # datatrove's inner bars would tear ours; read at tqdm's import
