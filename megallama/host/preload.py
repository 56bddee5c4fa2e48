"""What the server of `ranks.py` imports first: the libraries that it imports next read files of their own."""

from megallama.host.utf8 import use_utf8

use_utf8()
