"""The image's HEALTHCHECK: asks /ready where the settings say, prints the answer, exits 0 only when it is "ready".

What it prints stands in `docker inspect`. It asks this container itself, whatever address the daemon listens on.
"""

import http.client
import sys

from contentfilter.config import DEFAULT_PATH
from contentfilter.config.load import read_settings
from contentfilter.errors import ConfigError
from contentfilter.ops.http import parse_listen

WAIT = 5.0  # seconds; below the HEALTHCHECK's own limit
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - looked for, not listened on


def main() -> int:
    try:
        settings, _ = read_settings(DEFAULT_PATH)  # of a file with faults what is right, as the daemon goes on with
        where = parse_listen(settings.http.listen)
        if where is None:
            print('[http] listen is "off": the health check needs it, or switch the health check off')
            return 1
        host, port = where
        connection = http.client.HTTPConnection(EVERYWHERE.get(host, host), port, timeout=WAIT)
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        print(answer.read(4096).decode("utf-8", "replace"), end="")
    except (OSError, ValueError, http.client.HTTPException, ConfigError) as error:
        print(f"no answer: {error}")
        return 1
    return 0 if answer.status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main())
