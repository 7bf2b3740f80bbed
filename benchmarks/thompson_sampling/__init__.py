"""Thompson sampling at scale: the papers' benchmark."""
