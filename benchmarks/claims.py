"""The paper's claims, checked on the embedded model: measures, and writes claims.md with a verdict for each.

  python benchmarks/claims.py                    # 8 prompts x 3 seeds: about an hour on two idle cores
  python benchmarks/claims.py --fast             # 3 prompts x 2 seeds, less of everything: minutes
  python benchmarks/claims.py --claims ab        # only some of the claims
  python benchmarks/claims.py --page_only        # the page again, from the measurements that are there

(a) reward against time: DNO, best-of-N, random restarts     (d) estimated gradients on JPEG size
(b) darkness with gamma 0, 0.1, 1, 10                         (e) the full gradient against skip_unet
(c) eta, and which noises                                     (f) the spectral step against AdamW

Each measurement (one run on one prompt) is a file in the work folder, named by a digest of all its settings; repeated,
the command makes those that are missing, and resumes the runs that were stopped. Another size (--num_steps and so on)
is measured again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from claims.command import main

if __name__ == "__main__":
    main(__doc__)
