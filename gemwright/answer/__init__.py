"""A teacher answers prompts, and filters look at what it wrote. The stage is `stage`."""

from gemwright import curate  # noqa: F401 - first of all, for it quiets tqdm, which torch imports too
