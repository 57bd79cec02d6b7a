"""What lives at call time: sessions, packing, weight freshness, caches, artifacts."""
