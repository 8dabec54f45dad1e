import os
import tempfile

# Before vspdf is imported: the suite neither reads nor leaves anything in the user's cache.
_cache = tempfile.TemporaryDirectory(prefix="vspdf-tests-")
os.environ["VSPDF_CACHE"] = _cache.name
os.environ.setdefault("HF_HUB_OFFLINE", "1")
