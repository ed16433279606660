"""Health check of the image: requests /ready at the address in the settings, and exits 0 only if the daemon is ready.

    python healthy.py [SETTINGS]

Prints what prevents the daemon from being ready; `docker inspect` shows it.
"""

import http.client
import sys

from contentfilter.config import DEFAULT_PATH
from contentfilter.config.load import read_settings
from contentfilter.endpoint import parse_listen

WAIT = 5.0  # seconds; below the HEALTHCHECK's own limit
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - looked up, not listened on


def main(path: str = DEFAULT_PATH) -> int:
    """Check once, and return the exit status."""
    where = parse_listen(read_settings(path)[0].http.listen)  # of a file with errors, its valid part
    if where is None:
        print('[http] listen is "off": readiness cannot be checked without it')
        return 1
    host, port = where
    try:
        connection = http.client.HTTPConnection(ANY.get(host, host), port, timeout=WAIT)  # no proxy of the environment
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        print(answer.read(4096).decode("utf-8", "replace"), end="")
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer from {host}:{port}: {error}")
        return 1
    return 0 if answer.status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
