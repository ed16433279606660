"""One attack in a process of its own: ``python bench/attacks NAME UID GID PLACE`` (PLACE: JSON). Runs until killed."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attacks.kit import Place, become
from attacks.table import ATTACKS

if __name__ == "__main__":
    name, uid, gid, place = sys.argv[1:]
    attack = ATTACKS[name]
    here = Place(**json.loads(place))
    if attack.prepare is not None:
        attack.prepare(here)
    become(int(uid), int(gid))
    print("ready", flush=True)
    attack.act(here)
