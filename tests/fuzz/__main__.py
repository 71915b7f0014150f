"""Print the cases of one target for a range of seeds: PYTHONPATH=.:tests python -m fuzz "model weights" 0 50"""

import sys
import tempfile
import warnings
from pathlib import Path

from fuzz.fuzz_case import Wrong, run_case, tally
from fuzz.targets import TARGETS

warnings.simplefilter("ignore")
name, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
target = next(target for target in TARGETS if target.name == name)
found, wrong = [], 0
with tempfile.TemporaryDirectory() as temporary:
    good = Path(temporary, "good")
    good.mkdir()
    target.make(good)
    for seed in range(first, last):
        folder = Path(temporary, str(seed), "input")
        folder.parent.mkdir()
        try:
            outcome, text = run_case(target, seed, good, folder)
            found.append(outcome)
            print(f"{seed} {outcome}: {text}"[:400])
        except Wrong as why:
            wrong += 1
            print(f"WRONG {why}")
print(tally({name: found}), f"\n{wrong} wrong")
