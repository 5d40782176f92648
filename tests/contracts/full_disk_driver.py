"""The real command line on a disk that is full from the N-th flush on.

    python -m tests.contracts.full_disk_driver N run tiny runs_root=…

Every writer of ours flushes what it wrote before it counts (fsync), and that is where file systems
that allocate late report a full disk.
"""

import errno
import os
import sys
from unittest.mock import patch

from stillhouse.cli import main

left = int(sys.argv[1])
flush = os.fsync


def failing_flush(descriptor: int) -> None:
    global left
    left -= 1
    if left < 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    flush(descriptor)


sys.argv = ["stillhouse", *sys.argv[2:]]
with patch.object(os, "fsync", failing_flush):
    main()
