"""What a packed Monitor starts with. Any Python can read it, to say what is wrong."""

import os
import sys

if sys.version_info < (3, 11):
    sys.exit("monitor: this is Python %d.%d, and Monitor needs 3.11 or newer" % sys.version_info[:2])

sys.path[0] = os.path.abspath(sys.path[0])  # the folder that we work in may change

from monitor import main  # noqa: E402

if __name__ == "__main__":
    main()
