"""A cache directory of a test's own in all but the C++ kernels: building one takes seconds that such a test is not about."""

from pathlib import Path

from thresher.files import cache_dir


def own_cache(folder: Path) -> str:
    """Give `folder`, which becomes `THRESHER_CACHE_DIR`, the kernels of the cache that is in use; its path."""
    built = cache_dir() / "native"
    for made in (built, folder):
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "native").symlink_to(built)
    return str(folder)
